"""A digest of all that a trace depends on: equal digests mean equal traces, also in another process."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ot.graph.capture.description import ModuleDescription, Undescribed, described_value

_THIS = Path(__file__).parents[1]
_ROOT = __name__.partition(".")[0]
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_PATHS = {Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib")}
_STANDARD = tuple(f"{path}{os.sep}" for path in _PATHS | {path.resolve() for path in _PATHS})
# Their code is told by the version of Python and of torch.
_VERSIONED = ("torch", "builtins", "numpy")
# Constants of a user's file that may steer its forward.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
# A package of more files is not read for this.
_MOST_FILES = 2000
_LARGEST_FILE = 1 << 24


def architecture_digest(description: ModuleDescription, training: Iterable[bool]) -> str:
    """Returns the digest of a module: what it is apart from its weights, and the code behind it.

    Args:
        description: Of the module.
        training: The mode of every submodule.

    Raises:
        Undescribed: Something about it can be told by identity only, or its code stands in no file.
    """
    if description.unknown:
        raise Undescribed(f"a {type(description.unknown[0]).__name__}")
    writer = _Writer()
    writer.write(description.form)
    writer.write(tuple(map(str, training)))
    writer.write(tuple(_code_behind(writer.modules)))
    writer.write(tuple(_surroundings()))
    return writer.digest()


def inputs_digest(inputs: tuple[object, ...]) -> str:
    """Returns the digest of inputs as `torch.export` sees them: the numbers in a tensor do not matter to it.

    Raises:
        Undescribed: An input can be told by identity only.
    """
    writer = _Writer()
    for value in inputs:
        if isinstance(value, Tensor):
            writer.write(("input", type(value), tuple(value.shape), value.stride(), value.dtype, str(value.device)))
            writer.write((str(value.layout), value.requires_grad))
        else:
            writer.write(described_value(value))
    return writer.digest()


def package_digest(name: str) -> str:
    """Returns the digest of the Python files of a package or a module at the top, which need not be imported.

    Raises:
        Undescribed: It has no files, or too many.
    """
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise Undescribed(f"package {name}") from error
    if found is None:
        raise Undescribed(f"package {name}")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    if not folders and found.origin is not None:
        files = [Path(found.origin)]
    return _files_digest(name, files)


def own_digest() -> str:
    """Returns the digest of the code that finds groups."""
    return _files_digest(_ROOT, sorted(_THIS.rglob("*.py")))


def text_digest(*parts: str) -> str:
    """Returns the digest of texts."""
    writer = _Writer()
    writer.write(parts)
    return writer.digest()


class _Writer:
    """Writes a description into a digest, every value with its kind and its length."""

    def __init__(self) -> None:
        self.modules: dict[str, None] = {}
        self._digest = hashlib.sha256()

    def digest(self) -> str:
        """Returns the digest of what was written."""
        return self._digest.hexdigest()

    def write(self, value: object) -> None:
        """Writes one value.

        Raises:
            Undescribed: It has no value that another process would have too.
        """
        match value:
            case tuple():
                self._put("tuple", str(len(value)).encode())
                for part in value:
                    self.write(part)
                if len(value) > 2 and value[0] == "function":
                    self._note(str(value[1]))
            case str():
                self._put("text", value.encode("utf-8", "surrogatepass"))
            case bytes():
                self._put("bytes", value)
            case frozenset():
                self.write(("frozenset", *sorted(map(repr, value))))
            case bool() | int() | float() | complex() | None | types.EllipsisType() | torch.dtype():
                self._put(type(value).__name__, repr(value).encode())
            case type():
                self._class(value)
            case types.CodeType():
                self._code(value)
            case _:
                raise Undescribed(f"a {type(value).__name__}")

    def _put(self, kind: str, content: bytes) -> None:
        self._digest.update(f"{kind}:{len(content)}:".encode())
        self._digest.update(content)

    def _class(self, kind: type) -> None:
        """Writes a class by its name, where it can be found by that."""
        module = kind.__module__
        found: Any = sys.modules.get(module)
        for part in kind.__qualname__.split("."):
            found = vars(found).get(part) if found is not None else None
        if found is not kind and module != "builtins":
            raise Undescribed(f"class {kind.__qualname__}, which cannot be found by its name")
        self._put("class", f"{module}:{kind.__qualname__}".encode())
        for base in kind.__mro__:
            self._note(base.__module__)

    def _code(self, code: types.CodeType) -> None:
        self._put("code", code.co_code)
        self.write((code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
        self.write((code.co_flags, code.co_firstlineno, code.co_argcount, code.co_kwonlyargcount))
        self.write(code.co_consts)

    def _note(self, module: str) -> None:
        self.modules[module] = None


def _code_behind(modules: Iterable[str]) -> Iterator[str]:
    """Yields the digests of the code of modules: all files of a user's package, of an installed one its version too.

    Raises:
        Undescribed: A module was not read from a file.
    """
    packages: dict[str, None] = {}
    for name in sorted(modules):
        top = name.partition(".")[0]
        if top in _VERSIONED or top == _ROOT:
            continue
        file = _file_of(sys.modules.get(name))
        if file is None or name == "__main__":
            raise Undescribed(f"module {name}, which stands in no file")
        if _is_standard(file):
            continue
        yield _files_digest(name, [file])
        packages[top] = None
    for top in packages:
        file = _file_of(sys.modules.get(top))
        is_installed = file is not None and _is_installed(file)
        yield f"{top} {_version_of(top)}" if is_installed or file is None else package_digest(top)


def _surroundings() -> Iterator[str]:
    """Yields what else a forward may look at: the user's modules, their constants, and what torch is set to."""
    own = _own_packages()
    for name, module in sorted(sys.modules.items()):
        file, top = _file_of(module), name.partition(".")[0]
        if file is None or name == "__main__" or top in own or _is_standard(file) or _is_installed(file):
            continue
        yield _files_digest(name, [file])
        held = vars(module)
        yield repr([(key, held[key]) for key in sorted(held) if type(held[key]) in _PLAIN and not key.startswith("__")])
        uses = {_package_of(value) for value in held.values()}
        yield from (f"{used} {_version_of(used)}" for used in sorted(uses - {"", name, top}))
    yield f"{sys.version} {platform.machine()} {torch.__version__} {torch.version.git_version}"
    yield f"{torch.get_default_dtype()} {torch.get_default_device()} {torch.is_grad_enabled()}"
    yield f"{torch.is_inference_mode_enabled()} {torch.is_autocast_enabled('cpu')} {torch.cuda.is_available()}"


def _own_packages() -> set[str]:
    """Returns the packages of this program, whose files are digested as a whole where they matter."""
    return {
        _ROOT,
        *(name for name in sys.modules if name.startswith("mergeot_") and not name.startswith("mergeot_spec_")),
    }


def _package_of(value: object) -> str:
    """Returns the package at the top that a module, a class or a function comes from; of anything else none."""
    match value:
        case types.ModuleType():
            name = value.__name__
        case type() | types.FunctionType():
            name = value.__module__ or ""
        case _:
            name = ""
    return name.partition(".")[0]


def _version_of(package: str) -> str:
    module = sys.modules.get(package)
    version = vars(module).get("__version__") if module is not None else None
    return version if isinstance(version, str) else ""


def _file_of(module: types.ModuleType | None) -> Path | None:
    file = vars(module).get("__file__") if module is not None else None
    return Path(file) if isinstance(file, str) else None


def _is_standard(file: Path) -> bool:
    return str(file).startswith(_STANDARD) and not _is_installed(file)


def _is_installed(file: Path) -> bool:
    return any(folder in str(file) for folder in _INSTALLED)


def _files_digest(name: str, files: list[Path]) -> str:
    if not files or len(files) > _MOST_FILES:
        raise Undescribed(f"package {name} with {len(files)} files")
    found = hashlib.sha256(name.encode())
    for file in files:
        try:
            if file.stat().st_size > _LARGEST_FILE:
                raise Undescribed(f"file {file.name}")
            content = file.read_bytes()
        except OSError as error:
            raise Undescribed(f"file {file.name}") from error
        found.update(f"{file.name}:{len(content)}:".encode())
        found.update(content)
    return found.hexdigest()
