"""The guard: aligned sources are run beside the sources, and what computes something else is refused."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ot.errors import ResultError
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.moving import MovedState
from mergekit_ot.fusion.own_heads import CopyRunners
from mergekit_ot.fusion.repair import AlignedModels
from mergekit_ot.fusion.running import Inputs, Runner, State, difference, remarks_on
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.ir import AxisSlot
from mergekit_ot.storage.limits import CHECK_BYTES
from mergekit_ot.transport.coupling import Coupling

# Above it an aligned source computes something else; below the other it computes the same.
REFUSED, SAME = 1e-3, 1e-5
# How much more than its own noise an aligned source may differ, and by how much a control must differ to tell anything.
_NOISE, _TELLING = 10.0, 20.0
_LEAST_TELLING = 1e-6


@dataclass(frozen=True)
class FunctionCheck:
    """What the sources and their aligned copies computed.

    Attributes:
        error: The largest relative difference of their outputs.
        is_coupled: Whether a solver coupled any neurons.
        has_moved: Whether the couplings move any neuron.
        is_telling: Whether the outputs depend on what moved, so that their staying the same means something.
        is_exact: Whether every coupling only reorders neurons.
        filled: Tensors of zeros that were filled at random for a second comparison, since behind them nothing shows.
        filled_error: The largest relative difference in that one.
        noise: What the sources' own noise explains of the error, where that had to be asked; and of which kind it is.
        remarks: Sentences on what cannot be compared.
        skipped: Why nothing was run, so that there is no error; empty where the comparison was made.

    Example:
        >>> import torch
        >>> from mergekit_ot import fuse
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> fuse([net, net], example_inputs=torch.randn(2, 4)).check.sentence
        'The neurons were already in one order: nothing had to move.'
    """

    error: float
    is_coupled: bool
    has_moved: bool
    is_telling: bool
    is_exact: bool
    filled: tuple[str, ...] = ()
    filled_error: float = 0.0
    noise: str = ""
    remarks: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def sentence(self) -> str:
        """What the comparison says; empty where the warnings say it."""
        if self.skipped:
            return f"Whether the aligned sources compute what the sources compute was not checked: {self.skipped}."
        largest = max(self.error, self.filled_error)
        size = f"{largest:.1e}"
        if self.noise:
            return f"The aligned sources differ from the sources by {size} of the outputs' scale, {self.noise}."
        if largest >= SAME:
            return (
                f"The aligned sources differ from the sources by {size} of the outputs' scale; every coupling only "
                f"reorders neurons, and no more than {REFUSED:g} counts as rounding."
                if self.is_exact
                else f"Some couplings are no permutations: the aligned sources differ from the sources by {size}."
            )
        if not self.is_coupled:
            return "The neurons were taken as they stand: nothing was aligned."
        if not self.has_moved:
            return "The neurons were already in one order: nothing had to move."
        if not self.is_telling:
            return (
                "Nothing that moved reaches the outputs at the example inputs (they do not change when it is moved "
                "wrongly), so that they stay the same proves nothing."
            )
        filled = f" For this, zeros were filled at random, such as '{self.filled[0]}'." if self.filled else ""
        return f"The aligned sources compute what the sources compute (largest relative error {size}).{filled}"


# What holds where neurons are taken as they stand: nothing is moved, and every copy is the source itself.
AS_THEY_STAND = FunctionCheck(0.0, is_coupled=False, has_moved=False, is_telling=False, is_exact=True)


def check_function(
    models: AlignedModels, inputs: Inputs, template: Mapping[str, Tensor], seed: int = 0
) -> FunctionCheck:
    """Compares every source with its aligned copy.

    Args:
        models: The networks and their alignment.
        inputs: What they are run with.
        template: State dict of the fused architecture.
        seed: Seed of what zeros are filled with.

    Raises:
        ResultError: Every coupling only reorders neurons, and still a source computes something else by more than its
            noise explains; or an aligned source computes NaN.
    """
    guard = _Guard(models, inputs, template, seed)
    numbers = range(len(models.sources))
    run = [number for number in numbers if guard.has_changed(number)]
    asked = guard.memory(run)
    if asked > CHECK_BYTES.value:
        return FunctionCheck(
            error=math.nan,
            is_coupled=bool(models.alignment.couplings),
            has_moved=True,
            is_telling=False,
            is_exact=all(models.alignment.is_function_preserving(number) for number in numbers),
            skipped=(
                f"the networks take {CHECK_BYTES.shown(asked)} to run, and the limit is "
                f"{CHECK_BYTES.shown(CHECK_BYTES.value)} ({CHECK_BYTES.variable})"
            ),
        )
    return _joined([guard.check(number) if number in run else guard.unchanged() for number in numbers])


def _joined(checks: list[FunctionCheck]) -> FunctionCheck:
    """Returns what holds of all sources together; a source that did not move says nothing about the others."""
    moved = [check for check in checks if check.has_moved]
    return FunctionCheck(
        error=max(check.error for check in checks),
        is_coupled=any(check.is_coupled for check in checks),
        has_moved=bool(moved),
        is_telling=bool(moved) and all(check.is_telling for check in moved),
        is_exact=all(check.is_exact for check in checks),
        filled=tuple(dict.fromkeys(name for check in checks for name in check.filled)),
        filled_error=max(check.filled_error for check in checks),
        noise=next((check.noise for check in checks if check.noise), ""),
        remarks=tuple(remark for check in checks for remark in check.remarks),
    )


class _Guard:
    """Compares the sources of one fusion with their aligned copies."""

    def __init__(self, models: AlignedModels, inputs: Inputs, template: Mapping[str, Tensor], seed: int) -> None:
        self.models, self.alignment, self.inputs = models, models.alignment, inputs
        self.template, self.seed = template, seed
        # Built once for the copies of all sources, and for the sources of the same architecture.
        self.copies = CopyRunners(models.target, inputs, self.alignment)
        self.fused = self.copies.fused

    def has_changed(self, number: int) -> bool:
        """Whether the aligned copy of a source may be another network: neurons moved, or the architecture differs."""
        is_exact = self.alignment.is_function_preserving(number)
        is_rewritten = self.models.normal is not None
        return is_rewritten or not is_exact or bool(self._moved_groups(number)) or not self._is_as_fused(number)

    def unchanged(self) -> FunctionCheck:
        """Returns what holds of a source whose aligned copy is the source itself: it computes the same."""
        return FunctionCheck(0.0, bool(self.alignment.couplings), has_moved=False, is_telling=False, is_exact=True)

    def memory(self, numbers: Sequence[int]) -> int:
        """Returns how many bytes the modules take that some sources are compared with, one source at a time."""
        if not numbers:
            return 0
        own = [0 if self._is_as_fused(number) else _bytes_of(self.models.given[number]) for number in numbers]
        return _bytes_of(self.models.target) + max(own)

    def check(self, number: int) -> FunctionCheck:
        """Compares one source with its aligned copy."""
        source = self.models.given[number]
        own, state = self.fused if self._is_as_fused(number) else Runner(source, self.inputs), source.state
        aligned = self._moved(state, number)
        fused = self.copies.of(number)
        outputs, others = own.outputs(state), fused.outputs(aligned)
        error, remarks = difference(outputs, others), tuple(remarks_on(source.name, outputs))
        is_exact = self.alignment.is_function_preserving(number)
        noise = "" if error <= REFUSED else self._explained(own, state, number, error)
        moved = self._moved_groups(number)
        filled = self._filled(state, number) if moved and is_exact else {}
        whole = ChainMap(filled, state)  # type: ignore[arg-type]
        outputs = own.outputs(whole) if filled else []
        again = 0.0
        if filled and all(bool(torch.isfinite(each).all()) for each in outputs):
            aligned = self._moved(whole, number)
            others = fused.outputs(aligned)
            again = difference(outputs, others)
            if not again <= REFUSED:
                noise = self._explained(own, whole, number, again, next(iter(filled)))
        return FunctionCheck(
            error=error,
            is_coupled=bool(self.alignment.couplings),
            has_moved=bool(moved),
            is_telling=bool(moved) and self._is_telling(fused, aligned, others, moved, max(error, again)),
            is_exact=is_exact,
            filled=tuple(name for name in filled if self.template[name].ndim > 1),
            filled_error=again,
            noise=noise,
            remarks=remarks,
        )

    def _is_as_fused(self, number: int) -> bool:
        # One trace, and so one graph, serves all networks that differ in the values of their tensors at most.
        return self.alignment.graphs[number] is self.alignment.target and not self._is_untied

    @property
    def _is_untied(self) -> bool:
        normal = self.models.normal
        return normal is not None and bool(normal.aliases)

    def _moved_groups(self, number: int) -> list[str]:
        return [key for key, found in self.alignment.couplings.items() if not _stays(found[number])]

    def _moved(self, state: State, number: int) -> MovedState:
        return MovedState(self.models.rewritten(state, number), self.template, self.alignment, number)

    def _explained(self, own: Runner, state: State, number: int, error: float, filled: str = "") -> str:
        """Returns what explains a large error, empty for couplings that are no permutations.

        Raises:
            ResultError: Nothing does.
        """
        name = self.models.sources[number].name
        is_exact = self.alignment.is_function_preserving(number)
        if not is_exact and error < float("inf"):
            return ""
        moved = dict(self._moved(state, number))
        noise = own.noise(state, self.copies.of(number), moved) if is_exact else None
        if noise is not None:
            in_double = noise.error_in_double
            least = in_double if in_double < float("inf") else error
            if in_double <= REFUSED or least <= _NOISE * noise.rounding:
                return "which is rounding: the function is the same as far as the network's own noise lets it be told"
            if error <= _NOISE * noise.chance:
                return f"and two runs of one source differ by {noise.chance:.1e}: its forward draws random numbers"
        # Almost no fusion comes here, and what looks for the place takes time to import.
        from mergekit_ot.fusion.parting import first_parting

        size = f"its outputs differ by {error:.2g} of their scale" if error < float("inf") else "its outputs hold NaN"
        known = f" (with zeros, such as '{filled}', filled at random)" if filled else ""
        why = ", though every coupling only reorders neurons" if is_exact else ""
        place = first_parting(self.models, number, state, moved, self.inputs)
        raise ResultError(
            f"'{name}', moved into the fused order, computes something else than before{known}: {size}{why}. {place} "
            "Nothing was written. Run 'mergeot check' on this architecture; where a plugin's rule claims that "
            "operation, leave the plugin out (MERGEOT_PLUGINS) or correct its rule."
        )

    def _filled(self, state: State, number: int) -> dict[str, Tensor]:
        """Returns random values for the parameters that are all zero: what lies behind them does not show."""
        graph, generator = self.alignment.graphs[number], torch.Generator().manual_seed(self.seed)
        filled = {}
        for name in graph.layouts:
            tensor = state[name]
            if name not in graph.buffers and tensor.is_floating_point() and not _has_any(tensor):
                fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 1
                values = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
                filled[name] = values.to(tensor.dtype)
        return {**filled, **{alias: filled[name] for alias, name in graph.aliases.items() if name in filled}}

    def _is_telling(
        self, fused: Runner, aligned: MovedState, outputs: list[Tensor], moved: list[str], error: float
    ) -> bool:
        """Whether the outputs change when one place of each group that moved is put into another order."""
        wrong: dict[str, Tensor] = {}
        aliases = self.alignment.target.aliases
        slots = [_reader(self.alignment, key) for key in moved]
        # Groups that share an axis, as heads do with what they hold, must not turn it twice.
        for parameter, axis in dict.fromkeys((slot.parameter, slot.axis) for slot in slots if slot is not None):
            # A tied parameter is loaded once per name.
            for name in aligned:
                if aliases.get(name, name) == parameter:
                    wrong[name] = (wrong[name] if name in wrong else aligned[name]).flip(axis)
        found = fused.outputs(ChainMap(wrong, aligned), changed=wrong)  # type: ignore[arg-type]
        return not difference(outputs, found) <= max(_TELLING * error, _LEAST_TELLING)


def _bytes_of(source: SourceModel) -> int:
    return sum(tensor.nbytes for tensor in source.architecture.shapes.values())


def _has_any(tensor: Tensor) -> bool:
    """Whether a tensor has an entry that is not zero: mostly the first one tells."""
    return bool(tensor.numel()) and (bool(tensor[(0,) * tensor.ndim]) or bool(tensor.any()))


def _stays(coupling: Coupling | FamilyCoupling) -> bool:
    if isinstance(coupling, FamilyCoupling):
        pairs = (pair for context in coupling.members for pair in context)
        return all(ours == theirs for ours, theirs in pairs) and all(c.is_identity for c in coupling.members.values())
    return coupling.is_identity


def _reader(alignment: Alignment, key: str) -> AxisSlot | None:
    """Returns one place of a group that reads its neurons, or its last one; None where it stands nowhere else."""
    members = list(alignment.target.groups[key].places.values())
    readers = [slot for slot in members if slot.is_reader]
    return (readers or members)[-1] if len(members) > 1 else None
