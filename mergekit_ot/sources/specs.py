"""SPEC strings: what the user names on the command line becomes an architecture.

A SPEC is ``package.module:name``, ``path/to/file.py:name`` or a registered name, and may carry keyword arguments as a
query: ``nets.py:mlp?hidden=64&bias=false``.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from mergekit_ot.errors import ArchitectureError, MergeotError, unknown_name
from mergekit_ot.sources.libraries import named_in_library
from mergekit_ot.storage.files import missing_file
from mergekit_ot.storage.limits import shortened

if TYPE_CHECKING:
    from torch import nn

    from mergekit_ot.hooks.manager import PluginManager

# Characters of what somebody else's code says, at most.
_SAID = 400
_FORMS = (
    "A SPEC is package.module:name, path/to/file.py:name or a registered name, with arguments as ?key=value&key=value."
)


@dataclass(frozen=True)
class Spec:
    """A SPEC taken apart: where to look, which name there (None for a registered name), and keyword arguments."""

    text: str
    place: str
    name: str | None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def is_file(self) -> bool:
        """Whether the place is a Python file."""
        return self.place.endswith(".py")


def parse_spec(text: str) -> Spec:
    """Takes a SPEC string apart.

    Example:
        >>> parse_spec("nets.py:mlp?hidden=64&bias=false").arguments
        {'hidden': 64, 'bias': False}
    """
    target, _, query = text.partition("?")
    arguments = {key: parse_value(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    place, colon, name = target.rpartition(":")
    if not colon or (len(place) == 1 and name.startswith(("/", "\\"))):  # a Windows drive is not a place
        return Spec(text, target, None, arguments)
    return Spec(text, place, name, arguments)


def parse_value(text: str) -> object:
    """Reads a value as a number, a boolean, None, a tuple of numbers, or else as a string.

    Example:
        >>> parse_value("3"), parse_value("0.5"), parse_value("true"), parse_value("64,32"), parse_value("relu")
        (3, 0.5, True, (64, 32), 'relu')
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        parts = [parse_value(part.strip()) for part in text.split(",") if part.strip()]
        return tuple(parts) if parts and all(isinstance(part, int | float) for part in parts) else text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Architecture:
    """What builds fresh instances of a module.

    Attributes:
        name: The registered name, or the SPEC as the user wrote it.
        arguments: Keyword arguments of every call.
        build: What is called.
        is_registered: Whether a checkpoint may carry the name: only registered names are looked up from files.
        unknown: What of the function was only guessed ("the activation between the layers"); such an architecture tells
            which neurons belong together, and must not be run to see what a network computes.

    Example:
        >>> from torch import nn
        >>> Architecture("layer", {"width": 5}, lambda width: nn.Linear(3, width))()
        Linear(in_features=3, out_features=5, bias=True)
    """

    name: str
    arguments: dict[str, Any]
    build: Callable[..., Any]
    is_registered: bool = False
    unknown: str = ""

    def __call__(self) -> nn.Module:
        """Returns a fresh instance.

        Raises:
            ArchitectureError: The callable raised, or returned no module.
        """
        from torch import nn

        module = call_with(self.build, self.arguments, f"architecture '{self.name}'", ArchitectureError)
        if not isinstance(module, nn.Module):
            raise ArchitectureError(
                f"Architecture '{self.name}' returned a {type(module).__name__}, not a torch.nn.Module. "
                "Name a class or a function that builds the network."
            )
        return module


def resolve_architecture(
    spec: str, manager: PluginManager | None = None, arguments: Mapping[str, Any] | None = None
) -> Architecture:
    """Finds the architecture that a SPEC names.

    Args:
        spec: The SPEC; a registered name may be given with `arguments` instead of a query.
        manager: Whose registered architectures are known; the installed plugins by default.
        arguments: Further keyword arguments.

    Raises:
        ArchitectureError: The file, the module or the name does not exist, or importing it failed.

    Example:
        >>> make = resolve_architecture("torch.nn:Linear?in_features=3&out_features=2")
        >>> make().weight.shape
        torch.Size([2, 3])
    """
    from torch import nn

    parsed = parse_spec(spec)
    given = {**(arguments or {}), **parsed.arguments}
    table = registered(manager, "architectures")
    if parsed.name is None and parsed.place in table:
        return Architecture(parsed.place, given, table[parsed.place].load(), is_registered=True)
    in_library = named_in_library(spec, registered(manager, "libraries"))
    if in_library is not None:
        return Architecture(spec, given, in_library)
    found = find_object(parsed, "architecture", table, ArchitectureError)
    if isinstance(found, nn.Module):
        # An instance is a prototype; calling it would run it.
        return Architecture(spec, {}, lambda: copy.deepcopy(found))
    if not callable(found):
        raise ArchitectureError(f"'{spec}' is a {type(found).__name__}, not a callable that builds a network. {_FORMS}")
    return Architecture(spec, given, found)


def registered(manager: PluginManager | None, kind: str) -> Mapping[str, Any]:
    """Returns a manager's table of one kind of thing; the installed plugins' by default."""
    if manager is None:
        from mergekit_ot.hooks.manager import default_manager

        manager = default_manager()
    return getattr(manager, kind)


def find_object(spec: Spec, kind: str, known: Mapping[str, Any], error: type[MergeotError]) -> Any:
    """Imports what a SPEC names in a file or a module.

    Raises:
        MergeotError: An error of the given type: not found (did you mean), or importing it failed.
    """
    if spec.name is None:
        if spec.is_file:
            _check_file(spec, error)
            names = ", ".join(_own_names(_load_file(spec, error))) or "nothing"
            raise error(f"'{spec.text}' names a file but nothing in it. Write {spec.place}:NAME; it defines: {names}.")
        raise error(f"{unknown_name(kind, spec.place, known)} {_FORMS}")
    if spec.is_file:
        _check_file(spec, error)
        module = _load_file(spec, error)
    else:
        module = _load_module(spec, error)
    found: Any = module
    for part in spec.name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as missing:
            raise error(_not_there(part, spec.place, _own_names(module))) from missing
    return found


def _not_there(part: str, place: str, names: list[str]) -> str:
    close = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
    guess = f" Did you mean '{place}:{close[0]}'?" if close else ""
    return f"There is no '{part}' in '{place}'.{guess} It defines: {', '.join(names) or 'nothing'}."


def call_with(function: Callable[..., Any], arguments: Mapping[str, Any], what: str, error: type[MergeotError]) -> Any:
    """Calls what the user named, and tells an argument that it does not take from a failure inside.

    Raises:
        MergeotError: An error of the given type.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as mismatch:
            takes = [str(parameter) for parameter in signature.parameters.values()]
            raise error(
                f"The {what} cannot be called with {_listed(arguments)}: {mismatch}. "
                f"It takes: {', '.join(takes) or 'no arguments'}. Give them as a query: SPEC?key=value&key=value."
            ) from mismatch
    try:
        return function(**arguments)
    except MergeotError:
        raise
    except Exception as failure:
        raise error(f"The {what} raised {_raised(failure)}. Called with {_listed(arguments)}.") from failure


def _check_file(spec: Spec, error: type[MergeotError]) -> None:
    path = Path(spec.place)
    if not path.is_file():
        raise error(f"{missing_file(path)} It was looked for because of '{spec.text}'.")


def _load_file(spec: Spec, error: type[MergeotError]) -> ModuleType:
    path = Path(spec.place).resolve()
    name = f"mergeot_spec_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise error(f"'{path}' cannot be imported as Python. {_FORMS}")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    # A file may import its neighbours, as it could when run as a script.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        loader.loader.exec_module(module)
    except Exception as failure:
        del sys.modules[name]
        raise error(f"Importing '{spec.place}' raised {_raised(failure)}. Try: python {spec.place}") from failure
    return module


def _load_module(spec: Spec, error: type[MergeotError]) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(spec.place)
    except ModuleNotFoundError as missing:
        if missing.name and spec.place.startswith(missing.name):
            file = f"{spec.place}.py"
            hint = f" Did you mean the file '{file}:{spec.name}'?" if Path(file).is_file() else ""
            raise error(f"There is no module '{spec.place}' (from '{spec.text}').{hint} {_FORMS}") from missing
        raise error(f"Importing '{spec.place}' raised {_raised(missing)}.") from missing
    except Exception as failure:
        raise error(f"Importing '{spec.place}' raised {_raised(failure)}.") from failure


def _own_names(module: ModuleType) -> list[str]:
    """Names that a module defines itself, without what it imports."""
    return sorted(name for name, value in vars(module).items() if _is_own(name, value, module))


def _is_own(name: str, value: object, module: ModuleType) -> bool:
    if name.startswith("_") or isinstance(value, ModuleType):
        return False
    # Numbers, lists and the like know no module, and no class or protocol tells them from what knows one.
    return getattr(value, "__module__", module.__name__) == module.__name__


def _raised(failure: Exception) -> str:
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace is not None else ""
    said = next(iter(str(failure).splitlines()), "no message")
    return f"{type(failure).__name__}: {shortened(said, _SAID)}{where}"


def _listed(arguments: Mapping[str, Any]) -> str:
    shown = (f"{shortened(key)}={shortened(repr(value), _SAID)}" for key, value in list(arguments.items())[:20])
    return ", ".join(shown) or "no arguments"
