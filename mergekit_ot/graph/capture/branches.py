"""Branches in the code of a module that a recorded program takes one side of: on sizes, types, values and counters.

What is looked for is read from the source of ``forward`` and of the functions that it calls; nothing is run. A branch
on the configuration (``self.training``, ``self.norm is None``) is none: it is the same in every call.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator, Sequence

from torch import fx, nn

from mergekit_ot.graph.capture.questions import Branch, Case, QuestionReader, is_self

# Libraries whose own branches are none of the user's.
_LIBRARIES = ("torch", "numpy", "builtins", "einops", "functools", "typing", "logging", "warnings", "math")
# How deep calls are followed.
_DEPTH = 4
# How many questions are told.
_MOST = 3
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def branch_sentences(branches: Sequence[Branch]) -> tuple[str, ...]:
    """Returns what a user should know of branches, of many the first ones."""
    told = [branch for branch in branches if branch.question]
    more = f"There are {len(told) - _MOST} more questions of this kind in its code."
    return (*(branch.sentence for branch in told[:_MOST]), *([more] if len(told) > _MOST else []))


def reached_branches(model: nn.Module, graph: fx.Graph) -> tuple[Branch, ...]:
    """Returns the branches of a module that a recorded program came to."""
    branches = find_branches(model)
    lines: dict[str, set[int]] = {branch.file: set() for branch in branches}
    traces = {node.meta.get("stack_trace") or "" for node in graph.nodes} if branches else set()
    for file, line in {found for trace in traces for found in _FRAME.findall(trace)}:
        if file in lines:
            lines[file].add(int(line))
    return tuple(branch for branch in branches if branch.is_reached(lines[branch.file]))


def find_branches(model: nn.Module) -> tuple[Branch, ...]:
    """Returns the branches in the code of a module's own classes, each question once."""
    found: dict[tuple[str, str], Branch] = {}
    examples: dict[type, nn.Module] = {}
    for module in model.modules():
        examples.setdefault(type(module), module)
    for kind, module in examples.items():
        if not _is_library(kind.__module__):
            for branch in _branches_of(kind, module):
                found.setdefault((branch.source, branch.question), branch)
    return tuple(found.values())


def stored_by_forward(model: nn.Module) -> frozenset[str] | None:
    """Returns the attributes that a forward may set, on any module; None where that cannot be read from the code."""
    names: set[str] = set()
    for module in model.modules():
        if module._forward_pre_hooks or module._forward_hooks:
            return None
    for kind in {type(module) for module in model.modules()}:
        for function in _reached(kind):
            tree = _tree(function)
            if tree is None:
                return None
            stores = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
            names |= _stored(tree) | {node.attr for node in stores if isinstance(node.ctx, ast.Store)}
    return frozenset(names)


def _is_library(name: str) -> bool:
    return name.split(".")[0] in _LIBRARIES


def _branches_of(kind: type, module: nn.Module) -> Iterator[Branch]:
    functions = list(_reached(kind))
    trees = [_tree(function) for function in functions]
    stored = frozenset[str]().union(*(_stored(tree) for tree in trees if tree is not None))
    home = next((function.__code__.co_filename for function in functions if function.__name__ == "forward"), "")
    for function, tree in zip(functions, trees, strict=True):
        if tree is None:
            yield _unread(kind.__name__, function)
        else:
            yield from QuestionReader(kind.__name__, home, function, module, stored).read(tree)


def _unread(owner: str, function: types.FunctionType) -> Branch:
    """Returns a branch for code without a source: it may compare a size with any number in it."""
    code = function.__code__
    numbers = [float(value) for value in code.co_consts if isinstance(value, int | float)]
    return Branch(Case.SIZE, owner, code.co_filename, code.co_firstlineno, "", tuple(numbers))


def _reached(kind: type) -> list[types.FunctionType]:
    """Returns the forward of a class and the functions that it calls: methods, and functions of its file by name."""
    first = _function(kind, "forward")
    reached: dict[types.FunctionType, None] = {} if first is None else {first: None}
    front = list(reached)
    for _ in range(_DEPTH):
        called = [other for function in front for other in _called(function, kind)]
        front = [other for other in dict.fromkeys(called) if other not in reached]
        reached |= dict.fromkeys(front)
    return list(reached)


def _called(function: types.FunctionType, kind: type) -> Iterator[types.FunctionType]:
    for name in function.__code__.co_names:
        for found in (_function(kind, name), function.__globals__.get(name)):
            if isinstance(found, types.FunctionType) and not _is_library(found.__module__ or ""):
                yield found


def _function(kind: type, name: str) -> types.FunctionType | None:
    """Returns a method that a class has from its own code, not from torch."""
    found = inspect.getattr_static(kind, name, None)
    found = found.fget if isinstance(found, property) else found
    found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
    if not isinstance(found, types.FunctionType) or _is_library(found.__module__ or ""):
        return None
    return inspect.unwrap(found)


def _tree(function: types.FunctionType) -> ast.AST | None:
    try:
        lines = inspect.getsource(function)
        return ast.parse(textwrap.dedent(lines))
    # Code that was changed since, or written in a notebook, does not stand where it says.
    except (OSError, SyntaxError, TypeError, ValueError, IndexError, tokenize.TokenError):
        return None


def _stored(tree: ast.AST) -> set[str]:
    """Returns the attributes of ``self`` that code sets, also by ``setattr`` and in place."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and is_self(node.value):
            names.add(node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            names |= {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
        if isinstance(node, ast.Call):
            names |= _stored_by_call(node)
    return names


def _stored_by_call(call: ast.Call) -> set[str]:
    """Returns what ``setattr(self, "name", …)``, ``self.name.append(…)`` and ``self.name.copy_(…)`` change."""
    if isinstance(call.func, ast.Name) and call.func.id == "setattr":
        return {str(part.value) for part in call.args if isinstance(part, ast.Constant)}
    changes = isinstance(call.func, ast.Attribute) and (
        call.func.attr in ("append", "extend", "update", "insert", "pop", "clear", "setdefault", "register_buffer")
        or (call.func.attr.endswith("_") and not call.func.attr.startswith("_"))
    )
    if not changes:
        return set()
    inside = ast.walk(call.func.value)  # type: ignore[attr-defined]
    named = {str(part.value) for part in call.args[:1] if isinstance(part, ast.Constant)}
    return named | {part.attr for part in inside if isinstance(part, ast.Attribute) and is_self(part.value)}
