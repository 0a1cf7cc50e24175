"""Questions that code asks, read from its source: on sizes, types and values of the inputs, and on earlier calls."""

from __future__ import annotations

import ast
import enum
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

# What is asked of a tensor's size or type.
_SIZES = frozenset({"shape", "size", "numel", "nelement"})
_TYPES = frozenset({"dtype", "is_floating_point", "get_default_dtype", "element_size"})
# What makes a number of a tensor, or a truth of many.
_VALUES = frozenset({"item", "tolist", "any", "all", "equal", "allclose", "isfinite", "isnan", "isinf", "numpy"})
_NUMBERS = frozenset({"float", "int", "bool"})
# Functions and methods that give one number.
_SCALAR = frozenset({"len", "min", "max", "abs", "sum", "round"})
_RANKS = frozenset({"ndim", "dim"})
# Questions on what an object is, not on the case.
_PLAIN = frozenset({"isinstance", "hasattr", "callable", "is_tensor", "is_tracing", "is_scripting", "is_compiling"})


class Case(enum.StrEnum):
    """What a branch looks at."""

    SIZE = "size"
    TYPE = "type"
    VALUE = "value"
    STATE = "state"


@dataclass(frozen=True)
class Branch:
    """A question in the code whose answer may differ from call to call.

    Attributes:
        case: What it looks at.
        owner: Name of the module's class.
        file: Where it stands.
        line: Where it stands.
        question: Its text; empty where the code cannot be read.
        numbers: What it compares with.
        inside: First and last line of the function, and of every block around the question.
        is_near: Whether the function stands in the file of the class.
    """

    case: Case
    owner: str
    file: str
    line: int
    question: str
    numbers: tuple[float, ...]
    inside: tuple[tuple[int, int], ...] = ()
    is_near: bool = True

    @property
    def source(self) -> str:
        """File and line for a message."""
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"

    def is_reached(self, lines: set[int]) -> bool:
        """Whether a run came to it, from the lines of its file that did something.

        A function that only asks does nothing itself; one of another file is then taken for a helper of a library.
        """
        function, *blocks = self.inside or ((0, 0),)
        if not any(function[0] <= line <= function[1] for line in lines):
            return self.is_near and not blocks
        return all(any(first <= line <= last for line in lines) for first, last in blocks)

    @property
    def sentence(self) -> str:
        """What a user should know of it."""
        return (
            f"The program was recorded for this case only: '{self.owner}' asks `{self.question}` ({self.source}), a "
            f"question on the {_LOOKS_AT[self.case]}, and what it does where the answer is another one was not traced."
        )


_LOOKS_AT = {
    Case.SIZE: "sizes of the inputs",
    Case.TYPE: "type of the numbers",
    Case.VALUE: "values of the inputs or the weights",
    Case.STATE: "calls before this one",
}


def is_self(node: ast.AST) -> bool:
    """Whether an expression is the module itself."""
    return isinstance(node, ast.Name) and node.id == "self"


@dataclass
class QuestionReader:
    """Reads the questions in one function.

    Attributes:
        owner: Name of the module's class.
        home: File of its forward.
        function: The function.
        module: A module of the class, whose numbers a question may compare with.
        stored: Attributes that a call of the module changes.
        kinds: Local name → what its value depends on.
        given: Names of what the function is given, and of what is made of it.
        asked_before: Local names that hold the answer of a question.
        around: Expression → the blocks of conditions around it, as lines.
    """

    owner: str
    home: str
    function: types.FunctionType
    module: nn.Module
    stored: frozenset[str]
    kinds: dict[str, Case] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    asked_before: set[str] = field(default_factory=set)
    around: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def read(self, tree: ast.AST) -> Iterator[Branch]:
        """Yields the branches of the function."""
        code = self.function.__code__
        self.given = set(code.co_varnames[: code.co_argcount]) - {"self", "cls"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
                self._assign(node)
        self._look_around(tree, ())
        refused = {id(node.test) for node in ast.walk(tree) if isinstance(node, ast.If) and _only_refuses(node)}
        tests = [test for node in ast.walk(tree) for test in _tests(node) if id(test) not in refused]
        asked = {id(part) for test in tests for part in ast.walk(test)}
        skipped = {id(part) for node in ast.walk(tree) for part in _unasked(node, refused)}
        for test in tests:
            yield from self._branch(test, is_test=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call | ast.Compare) or id(node) in asked or id(node) in skipped:
                continue
            if isinstance(node, ast.Compare):
                is_question = self._is_scalar(node.left)
            else:
                is_question = self._case_of(node) is Case.STATE
            if is_question:
                yield from self._branch(node, is_test=False)

    def _look_around(self, node: ast.AST, blocks: tuple[tuple[int, int], ...]) -> None:
        self.around[id(node)] = blocks
        for name, value in ast.iter_fields(node):
            parts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST)]
            inner = blocks
            if isinstance(node, ast.If) and name in ("body", "orelse") and parts:
                inner = (*blocks, self._lines(parts[0], parts[-1]))
            for part in parts:
                self._look_around(part, inner)

    def _lines(self, first: ast.AST, last: ast.AST) -> tuple[int, int]:
        start = self.function.__code__.co_firstlineno - 1
        return start + first.lineno, start + (last.end_lineno or last.lineno)  # type: ignore[attr-defined]

    def _assign(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        is_scalar = node.value is not None and self._is_scalar(node.value)
        case = self._case(node.value) if is_scalar and node.value is not None else None
        uses = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        for name in names:
            if case is not None:
                self.kinds[name] = case
                if isinstance(node.value, ast.Compare | ast.BoolOp):
                    self.asked_before.add(name)
            elif uses & self.given:
                self.given.add(name)

    def _branch(self, test: ast.expr, is_test: bool) -> Iterator[Branch]:
        case = self._case(test)
        if case is None and is_test and self._compares_data(test):
            case = Case.VALUE
        bare = test.operand if isinstance(test, ast.UnaryOp) else test
        is_repeated = isinstance(bare, ast.Name) and bare.id in self.asked_before
        if case is None or is_repeated or _asks_for_kind(test, case):
            return
        code = self.function.__code__
        text = " ".join(ast.unparse(test).split())
        shown = text if len(text) <= 80 else text[:77] + "..."
        function = (code.co_firstlineno, max(line for _, _, line in code.co_lines() if line))
        inside = (function, *self.around[id(test)])
        line, is_near = self._lines(test, test)[0], code.co_filename == self.home
        yield Branch(case, self.owner, code.co_filename, line, shown, tuple(self._numbers(test)), inside, is_near)

    def _case(self, node: ast.AST) -> Case | None:
        """Returns what an expression looks at: a counter before values, values before sizes and types."""
        found = set(self._cases(node))
        return next((case for case in (Case.STATE, Case.VALUE, Case.SIZE, Case.TYPE) if case in found), None)

    def _cases(self, node: ast.AST) -> Iterator[Case]:
        case = self._case_of(node)
        if case is not None:
            yield case
        # A size or a type is asked of a tensor, whatever that was made of.
        if case not in (Case.SIZE, Case.TYPE):
            for part in ast.iter_child_nodes(node):
                yield from self._cases(part)

    def _case_of(self, part: ast.AST) -> Case | None:
        if isinstance(part, ast.Name):
            return self.kinds.get(part.id)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in ("hasattr", "getattr"):
            named = {given.value for given in part.args if isinstance(given, ast.Constant)}
            return Case.STATE if named & self.stored else None
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and self._is_data(part):
            return Case.SIZE if part.func.id == "len" else Case.VALUE if part.func.id in _NUMBERS else None
        if not isinstance(part, ast.Attribute):
            return None
        if is_self(part.value):
            return Case.STATE if part.attr in self.stored else None
        if part.attr in _VALUES:
            return Case.VALUE if self._is_data(part.value) else None
        return Case.SIZE if part.attr in _SIZES else Case.TYPE if part.attr in _TYPES else None

    def _is_scalar(self, node: ast.AST) -> bool:
        """Whether an expression is a number, a truth or a list of sizes, not a tensor made with the help of some."""
        match node:
            case ast.Name():
                return node.id in self.kinds
            case ast.Call(func=ast.Name(id=name)):
                return name in _NUMBERS or name in _SCALAR
            case ast.Attribute(value=ast.Name(id="self")):
                return True
            case ast.Call(func=ast.Attribute(attr=name)) | ast.Attribute(attr=name):
                return name in _SIZES or name in _TYPES or name in _VALUES
            case ast.Subscript(value=inner) | ast.UnaryOp(operand=inner):
                return self._is_scalar(inner)
            case ast.BinOp(left=left, right=right):
                return all(isinstance(side, ast.Constant) or self._is_scalar(side) for side in (left, right))
            case ast.Tuple(elts=parts):
                return all(map(self._is_scalar, parts))
        return isinstance(node, ast.Compare | ast.BoolOp | ast.Constant)

    def _is_data(self, node: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id in self.given for part in ast.walk(node))

    def _compares_data(self, test: ast.expr) -> bool:
        """Whether a question compares what was made of the inputs; a bare name in a helper may be any setting."""
        compares = (part for part in ast.walk(test) if isinstance(part, ast.Compare))
        is_forward = self.function.__name__ == "forward"
        return any(self._is_data(part) and (is_forward or _calls_method(part)) for part in compares)

    def _numbers(self, node: ast.AST) -> Iterator[float]:
        """Yields the numbers in an expression: literal, of the file, or of the module."""
        for part in ast.walk(node):
            value: object = None
            if isinstance(part, ast.Constant):
                value = part.value
            elif isinstance(part, ast.Name):
                value = self.function.__globals__.get(part.id)  # pyright: ignore[reportAttributeAccessIssue]
            elif isinstance(part, ast.Attribute) and is_self(part.value):
                value = vars(self.module).get(part.attr)
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield float(value)


def _calls_method(node: ast.AST) -> bool:
    calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
    return any(isinstance(call.func, ast.Attribute) for call in calls)


def _tests(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return [node.test]
    if isinstance(node, ast.Match):
        return [node.subject]
    return list(node.ifs) if isinstance(node, ast.comprehension) else []


def _unasked(node: ast.AST, refused: set[int]) -> Iterator[ast.AST]:
    """Yields what stands in an assertion, or in a test that only refuses."""
    if isinstance(node, ast.Assert) or (isinstance(node, ast.expr) and id(node) in refused):
        yield from ast.walk(node)


def _only_refuses(node: ast.If) -> bool:
    """Whether a test only guards an error: what it lets through goes one way."""
    return not node.orelse and all(isinstance(statement, ast.Raise) for statement in node.body)


def _asks_for_kind(test: ast.expr, case: Case) -> bool:
    """Whether a question is on what an object is, on its rank, or on whether something was given at all."""
    if case is Case.STATE:
        return False
    parts = list(ast.walk(test))
    names = {part.attr for part in parts if isinstance(part, ast.Attribute)}
    called = {part.func.id for part in parts if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
    operators = [operator for part in parts if isinstance(part, ast.Compare) for operator in part.ops]
    is_given = any(isinstance(operator, ast.Is | ast.IsNot) for operator in operators)
    return bool((names | called) & (_PLAIN | _RANKS)) or is_given
