"""What a module holds: names of tied tensors, and tensors outside its state."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from mergekit_ot.graph.capture.copying import recomputed_names


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns further name → first name for every parameter or buffer that a module holds under several names."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        # By identity, never by address: on the meta device every address is zero.
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


def hidden_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that a module keeps outside its parameters and buffers, also in lists and mappings."""
    hidden = {}
    # nn.LSTM keeps its parameters in a list besides; those are no hidden state.
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        # What a hook computes anew before every forward cannot be stale, nor the list of it in a recurrent module.
        computed = recomputed_names(module)
        skipped = ("_parameters", "_buffers", "_modules", *(["_flat_weights"] if computed else []))
        for name, value in vars(module).items():
            if not name.startswith(skipped) and name not in computed:
                for inner, tensor in _tensors_in(value, name):
                    if id(tensor) not in registered:
                        hidden[f"{path}.{inner}" if path else inner] = tensor
    return hidden


def _tensors_in(value: object, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if not isinstance(value, Mapping | list | tuple):
        return []
    tensors: list[tuple[str, Tensor]] = []
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if not isinstance(item, nn.Module):
            tensors += _tensors_in(item, f"{name}.{key}")
    return tensors


def hidden_sentences(hidden: Iterable[str], left: Collection[str]) -> tuple[str, ...]:
    """Returns a sentence for each tensor outside parameters and buffers.

    Args:
        hidden: Where they are.
        left: Those that an earlier forward may have left there.
    """
    why = {
        True: "and a stale value would enter the trace. Register it as a buffer, or trace a fresh instance.",
        False: "so no file brings it, and every network keeps its own. Register it as a buffer if they differ in it.",
    }
    return tuple(
        f"'{where}' is a tensor outside parameters and buffers: it is not in the state dict, {why[where in left]}"
        for where in hidden
    )
