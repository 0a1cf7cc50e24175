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

import contextlib
import difflib
import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator

from mergekit_ot.text import printable


class MergeotError(Exception):
    """A problem with what the user gave, told in one message; names in it are shown so that nothing in them acts."""

    def __str__(self) -> str:
        return printable(super().__str__())


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


@contextlib.contextmanager
def blaming(maker: object, doing: str, kind: type[MergeotError] = PluginError) -> Iterator[None]:
    """Turns whatever foreign code raises into one error that says what it did and who brought it.

    Args:
        maker: An object, class or function of the foreign code.
        doing: What it does, as the subject of a sentence.
        kind: Class of the error.

    Raises:
        MergeotError: The block raised something; an error of this package passes as it is.

    Example:
        >>> with blaming(len, "Solver 'mine'"):
        ...     raise ZeroDivisionError("division by zero")
        Traceback (most recent call last):
        ...
        mergekit_ot.errors.PluginError: Solver 'mine' (of module 'builtins') raised ZeroDivisionError: division by \
zero. Report it to those who made it, with the traceback that MERGEOT_DEBUG=1 shows, or leave its plugin out with \
MERGEOT_PLUGINS.
    """
    try:
        yield
    except MergeotError:
        raise
    # A plugin that calls sys.exit would end the program without a word.
    except (Exception, SystemExit) as error:
        raise kind(
            f"{doing} (of {origin_of(maker)}) raised {reason_of(error)}. Report it to those who made it, with the "
            "traceback that MERGEOT_DEBUG=1 shows, or leave its plugin out with MERGEOT_PLUGINS."
        ) from error


def origin_of(thing: object) -> str:
    """Returns who brought an object, class or function: its distribution, or its module where none is known.

    Example:
        >>> origin_of(len)
        "module 'builtins'"
    """
    module = inspect.getmodule(thing) or inspect.getmodule(type(thing))
    if module is None:
        return "unknown origin"
    owners = importlib.metadata.packages_distributions().get(module.__name__.partition(".")[0], ())
    return f"distribution '{owners[0]}'" if owners else f"module '{module.__name__}'"


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and all that led to it, each once: where one is raised anew, two can lead to each other.

    Example:
        >>> first, second = ValueError("first"), KeyError("second")
        >>> first.__cause__, second.__context__ = second, first
        >>> [type(cause).__name__ for cause in causes_of(first)]
        ['ValueError', 'KeyError']
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [cause.__context__, cause.__cause__]


def reason_of(error: BaseException) -> str:
    """Returns the class and the first line of an error, without a full stop.

    Example:
        >>> reason_of(OSError("disk full."))
        'OSError: disk full'
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
