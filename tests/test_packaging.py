"""What is installed: the documentation that messages point to, and what a wheel and an sdist hold."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergekit_ot import default_manager
from mergekit_ot.cli.app import build_app
from mergekit_ot.cli.docs import installed_pages

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for folder in ("mergekit_ot", "plugins") for file in (ROOT / folder).rglob("*.py"))
IS_CHECKOUT = (ROOT / "mergekit_ot").is_dir()


def run(*arguments: str):
    return CliRunner().invoke(build_app(default_manager()), ["docs", *arguments])


def messages(code: str) -> list[str]:
    """Returns the texts of a module but for its docstrings."""
    tree = ast.parse(code)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owners = [node for node in ast.walk(tree) if isinstance(node, documented)]
    docstrings = {id(node.body[0].value) for node in owners if node.body and isinstance(node.body[0], ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_messages_name_pages_and_never_files_of_the_checkout():
    named = set()
    for file in SOURCES:
        for text in messages(file.read_text(encoding="utf-8")):
            assert not re.search(r"docs/[\w-]+(/[\w-]+)*\.md", text), f"{file}: {text}"
            named |= set(re.findall(r"mergeot docs ([a-z][\w-]+)", text))
    assert named <= set(installed_pages())
    assert not IS_CHECKOUT or "unknown-operations" in named


def test_a_text_that_names_a_file_of_the_checkout_is_found():
    assert messages('"""Kept: docs/a.md."""\nADVICE = "Read docs/a.md."') == ["Read docs/a.md."]


def test_the_pages_are_listed():
    outcome = run("--json")
    assert outcome.exit_code == 0
    pages = {row["page"]: row["title"] for row in json.loads(outcome.stdout)["pages"]}
    assert {"command-line", "solvers", "writing-plugins", "changelog", "unknown-operations"} <= set(pages)
    assert pages["command-line"] == "The command line"


def test_a_page_is_printed_as_it_is():
    assert run("solvers").stdout == installed_pages()["solvers"].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Solvers", "solvers.md", "explanation/solvers", "docs/explanation/solvers.md"])
def test_a_page_is_found_by_its_path_too(name):
    assert run(name).stdout == run("solvers").stdout


def test_a_page_that_does_not_exist_gets_a_guess():
    outcome = run("solver")
    assert outcome.exit_code == 1
    assert "Did you mean 'solvers'?" in str(outcome.exception)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    if not IS_CHECKOUT:
        pytest.skip("only a checkout is built")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    for target in ("wheel", "sdist"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def test_the_wheel_holds_code_types_pages_and_licence(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = {name.split("/")[0] for name in names if name.endswith("/__init__.py")}
    assert {f"{package}/py.typed" for package in packages if package.startswith("merge")} - names == set()
    for file in SOURCES:
        place = file.relative_to(ROOT / "plugins" if "plugins" in file.relative_to(ROOT).parts else ROOT)
        assert (place.as_posix() in names) != place.parts[0].startswith("example_"), place
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {f"mergekit_ot/{page}" for page in pages} | {"mergekit_ot/docs/changelog.md"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "docs")) for name in names)


def test_the_sdist_holds_what_is_built_and_tested(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"} <= names
    for folder in ("mergekit_ot", "plugins", "tests", "docs"):
        kept = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        missing = {path.relative_to(ROOT).as_posix() for path in kept if not path.name.endswith(".pyc")} - names
        assert not {name for name in missing if "egg-info" not in name}
