"""Which state in a file fits an architecture, and under which names: found where one way is meant, else asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from mergekit_ot.errors import ArchitectureError, CheckpointError
from mergekit_ot.fusion.architecture import KnownArchitecture
from mergekit_ot.progress import Notify
from mergekit_ot.sources.misfits import ask_for_key, ask_for_prefix, misfit_error, weights_besides
from mergekit_ot.storage.adapters import adapter_names
from mergekit_ot.storage.checkpoint import check_types
from mergekit_ot.storage.file_names import IGNORED, OUTSIDE, FileNames, constant_kind, constants_among
from mergekit_ot.storage.file_options import FileOptions
from mergekit_ot.storage.fitting import FittedStore, misfit
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.record import Checkpoint
from mergekit_ot.storage.renaming import RenamedStore, Renaming, behind_prefix, renamings
from mergekit_ot.storage.state_dicts import is_average, is_usual_key

# What tools leave in a state dict, by the last part of its name.
_LEFT_OVERS = {
    "total_ops": "left by a profiler",
    "total_params": "left by a profiler",
    "n_averaged": "a counter of averaged models",
    "num_updates": "a counter of an average",
    "initted": "a counter of an average",
}


@final
@dataclass(frozen=True)
class Fit:
    """A state that fits an architecture.

    Attributes:
        checkpoint: What was read: the file with the state dict in it that fits.
        state: The state in the architecture's order.
        names: How the names of the file differ.
    """

    checkpoint: Checkpoint
    state: FittedStore
    names: FileNames


def fit(checkpoint: Checkpoint, arch: str, known: KnownArchitecture, options: FileOptions, notify: Notify) -> Fit:
    """Returns the state of a file that fits an architecture, after checking that names and shapes agree.

    A tensor that the architecture has under several names may stand in the file under one of them. A prefix that all
    names of the network share is taken off. Where nothing is missing, what is no weight and not in the architecture is
    left out: masks, positions, counters, and what the options ignore. Where the file holds several state dicts, it is
    the one that fits.

    Args:
        checkpoint: What was read.
        arch: Name of the architecture, for messages.
        known: The architecture.
        options: What the user says about the file.
        notify: Told what was chosen.

    Raises:
        ArchitectureError: Names the tensors that are missing or unexpected, or the first shape that differs; or several
            states fit, which it lists.
    """
    fitting = _Fitting(known.shapes, known.ties, arch, options)
    others = {} if options.state_key is not None else dict(_fits_of_others(checkpoint, fitting))
    try:
        own = fitting.of(checkpoint)
    except ArchitectureError:
        plain = {key: other for key, other in others.items() if not is_average(key)} or others
        if not plain:
            raise
        if len(plain) > 1:
            raise ask_for_key(checkpoint, plain) from None
        (key, own), *_ = plain.items()
        del others[key]
        notify(f"{checkpoint.path}: the state under '{key}' is taken, which is the one that fits the architecture.")
    taken = own.checkpoint.key
    averages = {key for key in others if is_average(key)} if not is_average(taken) else set[str]()
    rivals = [key for key in others if key not in averages and is_usual_key(key) >= is_usual_key(taken)]
    if rivals:
        raise ask_for_key(checkpoint, [taken, *rivals])
    for key in sorted(averages):
        notify(
            f"{checkpoint.path}: averaged weights (EMA) stand under '{key}' too, and are not taken; "
            f"--state-key {key} takes them."
        )
    factors = adapter_names(own.checkpoint.state.names)
    if factors:
        notify(
            f"warning: {checkpoint.path} holds factors of adapters, such as '{shortened(factors[0])}'. They are fused "
            "as factors, and their products are then not the mean of the products. Merge the adapters into their bases "
            "first (merge_and_unload) where the mean is meant."
        )
    return own


def _fits_of_others(checkpoint: Checkpoint, fitting: _Fitting) -> Iterator[tuple[str, Fit]]:
    for key, read in checkpoint.alternatives.items():
        try:
            other = read()
            check_types(other)
            yield key, fitting.of(other)
        except (ArchitectureError, CheckpointError):
            continue


@final
@dataclass(frozen=True)
class _Fitting:
    """Fits states of files to one architecture."""

    expected: Mapping[str, Tensor]
    ties: Mapping[str, tuple[str, ...]]
    arch: str
    options: FileOptions

    def of(self, checkpoint: Checkpoint) -> Fit:
        """Returns how a state fits.

        Raises:
            ArchitectureError: It does not, or in several ways.
        """
        names = checkpoint.state.names
        difference = misfit(checkpoint.state, self.expected, self.ties, self._ignored(names))
        if difference is None:
            return self._fit(checkpoint, Renaming())
        ways = self._ways(names)
        shaped = [way for way in ways if self._is_shaped(checkpoint, way)]
        if len(shaped) > 1:
            raise ask_for_prefix(checkpoint, self.arch, [way.prefix for way in shaped])
        # One that fits by its names alone is told about where nothing else can be meant.
        meant = shaped or [way for way in ways if self._is_whole(checkpoint, way)]
        if meant:
            return self._fit(checkpoint, meant[0])
        raise misfit_error(checkpoint, self.arch, difference, self.options.strip_prefix)

    def _ways(self, names: Collection[str]) -> list[Renaming]:
        prefix = self.options.strip_prefix
        if prefix is None:
            return renamings(names, self.expected, self.ties)
        behind = behind_prefix(names, prefix)
        found = renamings(list(behind), self.expected, self.ties)
        # Of several ways behind a prefix that was asked for, that right behind it is meant.
        way = next((way for way in found if not way.prefix), found[0] if len(found) == 1 else None)
        if way is None:
            return []
        held = {name: behind[short] for name, short in way.held.items()}
        full, short = next((full, short) for short, full in behind.items())
        return [Renaming(held, full.removesuffix(short) + way.prefix, way.wrappers)]

    def _is_shaped(self, checkpoint: Checkpoint, way: Renaming) -> bool:
        return misfit(RenamedStore(checkpoint.state, way.held), self.expected, self.ties) is None

    def _is_whole(self, checkpoint: Checkpoint, way: Renaming) -> bool:
        besides = [name for name in checkpoint.state.names if name not in set(way.held.values())]
        return len(self._left_overs(checkpoint, besides)) == len(besides)

    def _fit(self, checkpoint: Checkpoint, way: Renaming) -> Fit:
        """Returns a state under the names of the architecture; what stands besides must be known or ignored."""
        store = RenamedStore(checkpoint.state, way.held) if way.sentence else checkpoint.state
        taken = set(way.held.values()) if way.sentence else self.expected.keys()
        besides = [name for name in checkpoint.state.names if name not in taken]
        difference = misfit(store, self.expected, self.ties, besides)
        if difference is not None:
            raise misfit_error(checkpoint, self.arch, difference, self.options.strip_prefix, way.sentence)
        copies = self._copies(checkpoint, besides)
        kept = self._left_overs(checkpoint, [name for name in besides if name not in copies])
        unknown = [name for name in besides if name not in kept and name not in copies]
        if unknown:
            raise weights_besides(checkpoint, self.arch, way, unknown)
        stale = [name for name in besides if name in copies or (is_average(name) and kept[name] in (IGNORED, OUTSIDE))]
        constants = {name: kind for name, kind in kept.items() if name not in stale}
        state = FittedStore(store, self.expected, self.ties)
        return Fit(checkpoint, state, FileNames(state.filled, constants, way if way.sentence else Renaming(), stale))

    def _copies(self, checkpoint: Checkpoint, besides: Sequence[str]) -> set[str]:
        """Returns the names of other whole copies of the network, beside one that the user chose."""
        if self.options.strip_prefix is None:
            return set()
        others = renamings(besides, self.expected, self.ties)
        return {name for other in others if self._is_shaped(checkpoint, other) for name in other.held.values()}

    def _ignored(self, names: Collection[str]) -> list[str]:
        return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in self.options.ignore)]

    def _left_overs(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
        """Returns name → what stands there, for names that no weights of the network need have."""
        found = dict.fromkeys(self._ignored(names), IGNORED)
        for name in names:
            kind = _LEFT_OVERS.get(name.rpartition(".")[2])
            if name not in found and kind is not None:
                found[name] = kind
        rest = [name for name in names if name not in found]
        if self.options.strip_prefix is None:
            return found | (constants_among(checkpoint.state, rest) or {})
        # The user said where the network is: the rest is no part of it, and only single numbers are looked at.
        single = {name: checkpoint.state.shape(name).numel() == 1 for name in rest}
        kinds = {name: constant_kind(checkpoint.state.read(name)) for name in rest if single[name]}
        return found | {name: kinds.get(name) or OUTSIDE for name in rest}
