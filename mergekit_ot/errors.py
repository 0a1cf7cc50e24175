"""Every error the package raises on purpose.

::

    MergeotError                   a problem with what the user gave; the command line prints it and exits with 1
    ├── CheckpointError            a file is missing, truncated, unsafe, or holds no state dict
    ├── ArchitectureError          a SPEC cannot be found, built or traced; a state does not fit its architecture
    ├── GraphMismatchError         two sources (or a source and the target) differ by more than neuron counts
    ├── RecipeError                an option, a model weight or a recipe key is wrong
    ├── DataError                  a data SPEC cannot be found or does not yield (inputs, targets) batches
    ├── SolverError                a solver cannot treat the problem, or returned something that breaks its contract
    ├── PluginError                a plugin cannot be loaded, or two plugins claim one name
    └── ResultError                what came out must not be written: another function, nothing aligned, NaN, odd shapes

Each message says what went wrong and where, why, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergeotError(Exception):
    """A problem with what the user gave, told in one message."""


class CheckpointError(MergeotError):
    """A checkpoint is missing, truncated, unsafe, or holds no state dict."""


class ArchitectureError(MergeotError):
    """An architecture cannot be found, built or traced, or a state does not fit it."""


class GraphMismatchError(MergeotError):
    """Two model graphs differ by more than the number of neurons in their groups."""


class RecipeError(MergeotError):
    """An option, a model weight or a recipe key is wrong."""


class DataError(MergeotError):
    """A data SPEC cannot be found or does not yield (inputs, targets) batches."""


class SolverError(MergeotError):
    """A solver cannot treat a problem, or broke its contract."""


class PluginError(MergeotError):
    """A plugin cannot be loaded, or two plugins claim one name."""


class ResultError(MergeotError):
    """What a fusion came to must not be written: an aligned source changed, nothing was aligned, a tensor is odd."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns the sentence for a name that is not registered: what, did you mean, what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    listing = ", ".join(names) if names else "none (is a plugin missing? see 'mergeot plugins')"
    return f"Unknown {kind} '{name}'.{guess} Known: {listing}."
