"""Names on the disk and names in the module: the library renames, stacks and splits weights where it reads them.

Its own rules say how (`transformers.core_model_loading`); they are run on tensors without memory to learn which tensors
of the file make which of the module, and on real ones when one is read or written.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from mergekit_ot import TensorStore
from mergekit_ot.errors import CheckpointError


@final
@dataclass
class Group:
    """Tensors of the file that become tensors of the module together.

    Attributes:
        key: The name under which the library collects them.
        converter: What the library does with them.
        files: Name in the file, and which of the converter's patterns it matched, in order.
        outputs: Name in the module → its shape and type.
    """

    key: str
    converter: WeightConverter
    files: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@final
class DiskNames:
    """Which tensors of a file make which of a module, and back.

    Args:
        model: An instance on the meta device.
        store: The tensors of the file.

    Attributes:
        plain: Name in the module → name in the file, for what is only renamed.
        groups: Name in the module → the group that it is made of.
        unused: Names in the file that the module has no use for.

    Raises:
        CheckpointError: The library's conversion fails on the tensors of the file.
    """

    def __init__(self, model: PreTrainedModel, store: TensorStore) -> None:
        self._model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.plain: dict[str, str] = {}
        self.groups: dict[str, Group] = {}
        self.unused: list[str] = []
        expected = dict(model.state_dict())
        self._ties = _ties_of(model)
        by_key: dict[str, Group] = {}
        for name in sorted(store.names, key=dot_natural_key):
            self._place(name, expected, by_key)
        for group in by_key.values():
            kinds = [(store.shape(name), store.dtype(name)) for name, _ in group.files]
            hollow = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in kinds]
            group.outputs = self.converted(group, hollow)
            self.groups |= dict.fromkeys(group.outputs, group)

    def _place(self, name: str, expected: dict[str, Tensor], by_key: dict[str, Group]) -> None:
        """Says where a tensor of the file belongs, as the library does when it loads."""
        prefix = self._model.base_model_prefix
        key, pattern = rename_source_key(name, self._renamings, self._converters, prefix, expected)
        if key not in expected:
            # Names that are the module's own already, but for the prefix of its base.
            other, _ = rename_source_key(name, [], [], prefix, expected)
            key, pattern = (other, None) if other in expected else (key, pattern)
        if key not in expected or key in self.plain:
            self.unused.append(name)
        elif pattern is None:
            self.plain[key] = name
        else:
            found = next(each for each in self._converters if pattern in each.source_patterns)
            by_key.setdefault(key, Group(key, found)).files.append((name, pattern))

    def converted(self, group: Group, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the module that those of a group in the file make.

        Raises:
            CheckpointError: They do not go together.
        """
        converter: Any = copy.deepcopy(group.converter)  # its annotations know futures only
        for (name, pattern), tensor in zip(group.files, tensors, strict=True):
            converter.add_tensor(group.key, name, pattern, tensor)
        return self._run(converter, group.key)

    def _run(self, converter: WeightConverter, key: str) -> dict[str, Tensor]:
        try:
            found: Mapping[str, Any] = converter.convert(key, model=self._model, config=self._model.config)
        except Exception as failure:
            said = next(iter(str(failure).splitlines()), type(failure).__name__)[:200]
            raise CheckpointError(
                f"The weights of '{key[:80]}' are not what transformers makes it of ({said}). Is the folder whole, and "
                "of the class in its config.json?"
            ) from failure
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def on_disk(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state of the module as the file has it: under its names, split and stacked like there.

        Raises:
            CheckpointError: A tensor is missing that stands in the file.
        """
        missing = next((name for name in (*self.plain, *self.groups) if name not in state), None)
        if missing is not None:
            raise CheckpointError(f"'{missing}' is missing in the state, and stands in the folder that it belongs to.")
        written = {file: state[name] for name, file in self.plain.items()}
        for group in {id(group): group for group in self.groups.values()}.values():
            written |= self._taken_apart(group, state)
        return written | {name: state[name] for name in self.apart(state)}

    def apart(self, state: Mapping[str, Tensor]) -> list[str]:
        """Returns the names of a state that the file does not have, but for those of weights that are tied to one."""
        extra = [name for name in state if name not in self.plain and name not in self.groups]
        return [name for name in extra if not any(_is_same(state, name, other) for other in self._ties.get(name, ()))]

    def _taken_apart(self, group: Group, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the file that the outputs of a group came from, by the library's reverse rule."""
        reverse: Any = group.converter.reverse_transform()
        by_key: dict[str, Any] = {}
        for name in group.outputs:
            key, pattern = apply_converters(name, [reverse])
            by_key.setdefault(key, copy.deepcopy(reverse)).add_tensor(key, name, pattern or name, state[name])
        renamings: list[Any] = [each.reverse_transform() for each in self._renamings[::-1]]
        made: dict[str, Tensor] = {}
        for key, converter in by_key.items():
            parts = self._run(converter, key)
            made |= {apply_renamings(name, renamings): part for name, part in parts.items()}
        return self._under_own_names(made, [name for name, _ in group.files])

    def _under_own_names(self, made: dict[str, Tensor], files: Collection[str]) -> dict[str, Tensor]:
        """Returns tensors under the names that they had in the file, which may lack or have the prefix of a base."""
        prefix = f"{self._model.base_model_prefix}."
        own = {}
        for name, tensor in made.items():
            choices = (name, name.removeprefix(prefix), prefix + name)
            own[next((choice for choice in choices if choice in files), name)] = tensor
        return own


def _ties_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns name → the other names of the same parameter."""
    classes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        classes.setdefault(id(parameter), []).append(name)
    return {name: [other for other in names if other != name] for names in classes.values() for name in names}


def _is_same(state: Mapping[str, Tensor], name: str, other: str) -> bool:
    return other in state and (state[other] is state[name] or torch.equal(state[other], state[name]))


@final
class ModuleStore(TensorStore):
    """The tensors of a folder under the names that the module has for them; each is made when it is asked for.

    Args:
        store: The tensors of the file.
        names: What makes what.
        reopen: Gives the same store in another process: a function and its arguments.
    """

    def __init__(self, store: TensorStore, names: DiskNames, reopen: tuple[Any, tuple[Any, ...]]) -> None:
        self.store, self.disk = store, names
        self._reopen = reopen
        self._names = dict.fromkeys((*names.plain, *names.groups))

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors in the module."""
        return self._names.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        group = self.disk.groups.get(self._known(name))
        return self.store.shape(self.disk.plain[name]) if group is None else group.outputs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        group = self.disk.groups.get(self._known(name))
        return self.store.dtype(self.disk.plain[name]) if group is None else group.outputs[name].dtype

    def read(self, name: str) -> Tensor:
        """Returns a tensor; what is stacked from several is put together each time."""
        group = self.disk.groups.get(self._known(name))
        if group is None:
            return self.store.read(self.disk.plain[name])
        return self.disk.converted(group, [self.store.read(file) for file, _ in group.files])[name].contiguous()

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor."""
        if self._known(name) in self.disk.plain:
            return self.store.slice(self.disk.plain[name], start, stop)
        return self.read(name)[start:stop]

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(name)
        return name

    def digest(self) -> str:
        """Returns the SHA-256 of the files."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the files."""
        self.store.close()
        self._names = {}

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._reopen
