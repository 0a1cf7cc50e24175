"""The architecture, read off the sources: who imports whom, how long things are, and what a quick command loads."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import networkx as nx
import pytest

import mergekit_ot
import mergekit_ot.testing
from mergekit_ot.hooks import hookspecs

ROOT = Path(__file__).parent.parent
CORE = "mergekit_ot"
FILE_LINES = 320
FUNCTION_LINES = 60

# The rooms of the core from the ground up, and what each may import besides itself. Folders and loose modules alike.
_GROUND = {"text", "errors", "progress", "threads"}
_IDEAS = {*_GROUND, "graph", "transport", "scoring", "storage"}
_ENGINE = {*_IDEAS, "fusion"}
_DOORS = {*_ENGINE, "hooks"}
_NAMES = {*_DOORS, "api", "sources", "pictures", "recipe", "recipe_files"}
MAY_IMPORT = {
    "text": set(),
    "errors": {"text"},
    "progress": set(),
    "threads": set(),
    "graph": _GROUND,
    "transport": _GROUND,
    "storage": _GROUND,
    "scoring": {*_GROUND, "storage"},
    "fusion": _IDEAS,
    "hooks": _ENGINE,
    "pictures": _ENGINE,
    "recipe_files": {*_GROUND, "storage"},
    "recipe": {*_ENGINE, "recipe_files"},
    "api": _DOORS,
    "sources": {*_DOORS, "api"},
    "report": _NAMES,
    "jobs": {*_NAMES, "report"},
    "cli": {*_NAMES, "report", "jobs"},
    "testing": {*_DOORS, "api"},
    "__main__": {"cli"},
}
LOOSE_MODULES = 7
PUBLIC = {CORE, f"{CORE}.errors", f"{CORE}.testing"}

LIBRARY = sorted([*(ROOT / CORE).rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
PLUGINS = sorted(folder.name for folder in (ROOT / "plugins").iterdir() if (folder / "__init__.py").is_file())


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(path: Path) -> str:
    base = ROOT / "plugins" if path.is_relative_to(ROOT / "plugins") else ROOT
    parts = list(path.relative_to(base).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(_tree(path)))


@functools.cache
def _imports(path: Path) -> list[str]:
    """Returns the modules that a file imports anywhere, also in functions and for type checking only."""
    return list(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base


@functools.cache
def _is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def _room(module: str) -> str:
    """Returns the folder, or the loose module, of the core that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


CORE_FILES = [path for path in LIBRARY if path.is_relative_to(ROOT / CORE)]
PLUGIN_FILES = [path for path in LIBRARY if path not in CORE_FILES]


def test_there_is_something_to_check():
    assert len(CORE_FILES) > 20
    assert len(PLUGINS) > 5


@pytest.mark.parametrize("path", CORE_FILES, ids=_id)
def test_core_imports_downwards(path):
    own = _room(_module(path))
    if own == "":
        return  # the table of public names, which imports for type checkers only
    for module in _imports(path):
        if module.split(".")[0] != CORE or module == CORE or _room(module) == own:
            continue
        assert _room(module) in MAY_IMPORT[own], f"{_id(path)} imports {module}"


@pytest.mark.parametrize("room", sorted(set(MAY_IMPORT) - {"testing", "cli"}))
def test_rooms_do_not_go_through_the_top(room):
    # The top level gives every public name, so importing from it would hide a direction; the version is no direction.
    for path in CORE_FILES:
        if _room(_module(path)) == room:
            taken = _taken_from_top(path)
            assert taken <= {"__version__"}, f"{_id(path)} imports {taken} from {CORE} itself; name the module"


def _taken_from_top(path: Path) -> set[str]:
    froms = [node for node in _nodes(path) if isinstance(node, ast.ImportFrom) and node.module == CORE]
    names = {alias.name for node in froms for alias in node.names}
    return {name for name in names if not _is_module(f"{CORE}.{name}")}


def _circles(edges: dict[str, set[str]]) -> list[list[str]]:
    graph = nx.DiGraph()
    graph.add_nodes_from(edges)
    graph.add_edges_from((source, target) for source, targets in edges.items() for target in targets)
    return [sorted(component) for component in nx.strongly_connected_components(graph) if len(component) > 1]


def test_no_files_of_the_core_import_each_other_in_a_circle():
    files = {_module(path): path for path in CORE_FILES if _module(path) != CORE}
    edges = {name: {module for module in _imports(path) if module in files} for name, path in files.items()}
    assert sum(map(len, edges.values())) > 100
    assert _circles(edges) == []


def test_a_circle_would_be_found():
    assert _circles({"first": {"second"}, "second": {"third"}, "third": {"first"}, "apart": {"first"}}) == [
        ["first", "second", "third"]
    ]


def test_few_modules_stand_loose_at_the_top():
    loose = [path.stem for path in (ROOT / CORE).glob("*.py") if path.stem != "__init__"]
    assert len(loose) <= LOOSE_MODULES, loose


def test_every_room_is_in_the_table():
    rooms = {_room(_module(path)) for path in CORE_FILES} - {""}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("path", CORE_FILES, ids=_id)
def test_core_knows_no_plugin(path):
    assert not [module for module in _imports(path) if module.split(".")[0] in PLUGINS]
    named = re.compile(rf"({'|'.join(PLUGINS)})([.:].*)?")
    for node in _nodes(path):
        # One of our plugins is called like a hook.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in _hooks():
            assert not named.fullmatch(node.value), f"{_id(path)}, line {node.lineno}: names a plugin"


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=_id)
def test_plugins_import_public_names_only(path):
    own = _module(path).split(".")[0]
    for module in _imports(path):
        top = module.split(".")[0]
        assert top != CORE or module in PUBLIC, f"{_id(path)} imports {module}, which is not public"
        assert top not in PLUGINS or top == own, f"{_id(path)} imports another plugin: {module}"


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=_id)
def test_plugins_take_names_that_exist(path):
    for node in _nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module == CORE:
            missing = [alias.name for alias in node.names if alias.name not in mergekit_ot.__all__]
            assert not missing, f"{_id(path)}, line {node.lineno}: not public: {missing}"


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=_id)
def test_plugins_need_no_way_around_the_door(path):
    assert not list(_ways_around(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    [
        "hasattr(label, name)",
        "getattr(label, 'pin', None)",
        "node.target._schema",
        "self.run._values",
        "from mergekit_ot import _HOMES",
        "from mergeot_log import _logger",
    ],
)
def test_a_way_around_the_door_is_seen(code):
    assert list(_ways_around(code))


@pytest.mark.parametrize("code", ["getattr(module, name)", "self._values", "cls._made", "row._replace(size=1)"])
def test_what_plugins_may_do_is_let_through(code):
    assert not list(_ways_around(code))


# What the core must ask all the same: what does not come from us, and has no class of its own.
ASKED = {"getattr(value, '__module__', module.__name__)", "getattr(status, 'name', status)"}


@pytest.mark.parametrize("path", CORE_FILES, ids=_id)
def test_core_does_not_ask_what_an_object_has(path):
    asked = [question for _, question in _questions(_tree(path))]
    assert set(asked) <= ASKED


def test_what_the_core_asks_is_asked_once():
    trees = [_tree(path) for path in CORE_FILES]
    asked = [question for tree in trees for _, question in _questions(tree)]
    assert len(asked) == len(set(asked))


def _questions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of every call that asks what an object has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            if node.func.id == "hasattr" or (node.func.id == "getattr" and is_literal):
                yield node.lineno, ast.unparse(node)


def _ways_around(code: str) -> Iterator[str]:
    """Yields where code asks what an object has, or takes what is private to something else."""
    yield from (f"line {line}: {question}" for line, question in _questions(ast.parse(code)))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in ("_replace", "_asdict"):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (CORE, *PLUGINS):
            yield from (f"line {node.lineno}: {alias.name}" for alias in node.names if _is_private(alias.name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("path", LIBRARY, ids=_id)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    for node in _nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) is not None else 0)
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines without its docstring"


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", LIBRARY, ids=_id)
def test_library_does_not_assert_and_finishes_what_it_starts(path):
    for node in _nodes(path):
        where = f"{_id(path)}, line {getattr(node, 'lineno', '?')}"
        assert not isinstance(node, ast.Assert), f"{where}: assert is switched off by python -O; raise an error"
        assert not (isinstance(node, ast.Name) and node.id == "NotImplementedError"), where


def test_every_name_of_the_top_level_can_be_imported():
    for name in mergekit_ot.__all__:
        assert getattr(mergekit_ot, name) is not None


def test_every_plugin_folder_has_an_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(project["entry-points"][CORE]) == PLUGINS


def test_every_package_says_that_it_is_typed():
    packages = [ROOT / CORE, *(ROOT / "plugins" / name for name in PLUGINS)]
    assert [package.name for package in packages if not (package / "py.typed").is_file()] == []


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"]], ids=lambda arguments: arguments[0])
def test_quick_commands_load_nothing_heavy(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['mergeot', *{arguments!r}]\n"
        "from mergekit_ot.cli.app import main\n"
        "try:\n"
        "    status = main()\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'networkx', 'ot', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mergeot" in done.stdout + done.stderr


@functools.cache
def _hooks() -> dict[str, str]:
    """Returns hook → signature line as it stands in the sources."""
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    return {
        node.name: f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}:"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.returns is not None and node.name.startswith("mergeot_")
    }


@functools.cache
def _sections() -> dict[str, str]:
    """Returns the sections of the hook reference by heading."""
    text = (ROOT / "docs" / "how-to" / "writing-plugins.md").read_text(encoding="utf-8")
    parts = re.split(r"^(#{2,3}) (.+)$", text, flags=re.MULTILINE)
    return {
        title: body for level, title, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True) if level == "###"
    }


@pytest.mark.parametrize(("hook", "signature"), _hooks().items())
def test_every_hook_is_documented_with_its_signature(hook, signature):
    sections = _sections()
    assert hook in sections
    assert f"\n{signature}\n" in sections[hook]


def test_no_hook_is_documented_that_does_not_exist():
    assert {title for title in _sections() if title.startswith("mergeot_")} == set(_hooks())
    assert len(_hooks()) == 17


# Public names whose examples are still to be written. A name that has one must go from here.
WITHOUT_EXAMPLE: set[str] = set()


def _with_docstrings(module: ModuleType) -> dict[str, object]:
    """Returns the public functions and classes of a module; an error's example is where it is raised."""
    public = {name: getattr(module, name) for name in module.__all__}
    return {
        name: thing
        for name, thing in public.items()
        if (inspect.isclass(thing) and not issubclass(thing, Exception)) or inspect.isroutine(inspect.unwrap(thing))
    }


def test_every_public_function_and_class_has_an_example() -> None:
    things = _with_docstrings(mergekit_ot) | _with_docstrings(mergekit_ot.testing)
    assert sum(inspect.isclass(thing) for thing in things.values()) > 30
    assert sum(not inspect.isclass(thing) for thing in things.values()) > 30
    assert {name for name, thing in things.items() if ">>>" not in (thing.__doc__ or "")} == WITHOUT_EXAMPLE
