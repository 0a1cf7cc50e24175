"""Pickles, read without calling anything that they name: what comes out is plain data, tensors, and stand-ins.

A pickle is a program for a small machine with a stack. The usual machine imports what the pickle names and calls it;
this one looks names up in a table of its own, and what is not there becomes a stand-in that does nothing. Steps, and
whatever a step copies, are counted, so that a small file cannot ask for much time or memory.
"""

from __future__ import annotations

import abc
import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from mergekit_ot.storage.limits import PICKLE_STEPS

# Larger whole numbers may share their hash with others, and a dictionary of such is slow without end.
_LARGEST_KEY = 2**60


class DamagedPickle(ValueError):
    """A pickle that ends early, or whose steps do not fit together."""


@final
@dataclass(frozen=True, eq=False)
class Named:
    """What a pickle names to be imported; it is never imported.

    Attributes:
        name: Its module and its name in it.
    """

    name: str


@final
@dataclass(frozen=True, eq=False)
class StandIn:
    """What would have been made by something that a pickle names.

    Attributes:
        name: What would have made it.
    """

    name: str


@final
class _Mark:
    """Where a group of values begins on the stack."""


class AbstractBuilt(abc.ABC):
    """What a maker gives where a pickle makes something first, and says later (BUILD) what it holds."""

    @abc.abstractmethod
    def build(self, state: object) -> None:
        """Takes what it holds.

        Raises:
            DamagedPickle: It cannot hold that.
        """


@final
@dataclass(frozen=True, eq=False)
class HeldBytes:
    """Bytes that a pickle spells as text, one character for each.

    Attributes:
        text: The text.
    """

    text: str


Maker = Callable[..., Any]


@final
class PickleReader:
    """Reads the pickles in a stream, one after the other.

    Args:
        stream: Where they stand.
        makers: What names stand for: each is called with the arguments in the pickle.
        where: Whose pickles they are, for the message when they take too many steps.

    Attributes:
        named: Everything that was named so far, in order.
        find: Returns what a pickle keeps outside of itself (the memory of tensors), by what it says about it.
    """

    def __init__(self, stream: io.BytesIO, makers: Mapping[str, Maker], where: str) -> None:
        self._stream, self._makers, self._where = stream, makers, where
        self._steps, self._most = 0, PICKLE_STEPS.value
        self.named: dict[str, None] = {}
        self.find: Callable[[object], object] = _nothing_outside
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> object:
        """Returns what the next pickle holds.

        Raises:
            DamagedPickle: It ends early, or its steps do not fit together.
            CheckpointError: It takes more steps than the limit; a maker refuses what it is given.
        """
        self.stack, self.memo = [], {}
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                self.spend(1)
                if opcode.name == "STOP":
                    return self.stack.pop()
                _STEPS[opcode.name](self, argument)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as failure:
            raise DamagedPickle(str(failure) or type(failure).__name__) from failure
        raise DamagedPickle("pickle exhausted before seeing STOP")

    def spend(self, steps: int) -> None:
        """Counts steps.

        Raises:
            CheckpointError: They are more than the limit.
        """
        self._steps += steps
        if self._steps > self._most:
            PICKLE_STEPS.check(self._steps, f"The structure of {self._where} takes at least")

    def since_mark(self) -> list[Any]:
        """Takes the values since the last mark off the stack, and the mark."""
        place = len(self.stack) - 1
        while not isinstance(self.stack[place], _Mark):
            place -= 1
            if place < 0:
                raise DamagedPickle("a group of values without a beginning")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def name(self, text: str) -> None:
        """Pushes what a pickle names."""
        self.named[text] = None
        self.stack.append(Named(text))

    def make(self, what: object, arguments: object) -> object:
        """Returns what something that was named makes of arguments: by the table, or a stand-in."""
        if not isinstance(what, Named) or not isinstance(arguments, tuple):
            raise DamagedPickle("a call of something that has no name")
        maker = self._makers.get(what.name)
        if maker is None:
            return StandIn(what.name)
        if arguments and isinstance(arguments[0], list | dict):
            self.spend(len(arguments[0]))  # it may be copied
        self.spend(_worth(arguments))
        return maker(*arguments)


def _nothing_outside(key: object) -> object:
    raise DamagedPickle("it keeps something outside of itself, which this kind of file does not")


def hashed(key: object) -> Any:
    """Returns what stands for a key in a mapping: itself, or a stand-in where many could share one hash."""
    if isinstance(key, str | bytes | float | bool | None):
        return key
    return key if isinstance(key, int) and abs(key) < _LARGEST_KEY else StandIn(type(key).__name__)


def _set_items(reader: PickleReader, values: list[Any]) -> None:
    target = reader.stack[-1]
    if len(values) % 2:
        raise DamagedPickle("a key without a value")
    if isinstance(target, dict):
        target.update(zip(map(hashed, values[::2]), values[1::2], strict=True))
    elif not isinstance(target, StandIn):
        raise DamagedPickle("items of something that is no mapping")


def _extend(reader: PickleReader, values: list[Any]) -> None:
    target = reader.stack[-1]
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, StandIn):
        raise DamagedPickle("entries of something that is no list")


def _pop(reader: PickleReader, count: int) -> list[Any]:
    if len(reader.stack) < count:
        raise DamagedPickle("more values are taken than there are")
    values = reader.stack[-count:]
    del reader.stack[-count:]
    return values


def _dictionary(reader: PickleReader, _: object) -> None:
    values = reader.since_mark()
    reader.stack.append({})
    _set_items(reader, values)


def _keep(reader: PickleReader, place: object) -> None:
    reader.memo[len(reader.memo) if place is None else int(str(place))] = reader.stack[-1]


def _call(reader: PickleReader, _: object) -> None:
    what, arguments = _pop(reader, 2)
    reader.stack.append(reader.make(what, arguments))


def _call_named(reader: PickleReader, _: object) -> None:
    what, arguments, _named = _pop(reader, 3)
    reader.stack.append(reader.make(what, arguments))


def _make_object(reader: PickleReader, _: object) -> None:
    what, *arguments = reader.since_mark()
    reader.stack.append(reader.make(what, tuple(arguments)))


def _make_instance(reader: PickleReader, text: str) -> None:
    arguments = tuple(reader.since_mark())
    reader.name(text.replace(" ", "."))
    reader.stack.append(reader.make(reader.stack.pop(), arguments))


def _name_of_two(reader: PickleReader, _: object) -> None:
    module, name = _pop(reader, 2)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise DamagedPickle("a name that is no text")
    reader.name(f"{module}.{name}")


def _build(reader: PickleReader, _: object) -> None:
    (state,) = _pop(reader, 1)
    target = reader.stack[-1]
    # Of what is not made there are no attributes.
    if isinstance(target, AbstractBuilt):
        reader.spend(_worth(state))
        target.build(state)


def _worth(value: object) -> int:
    """Returns the steps that bytes are worth which are copied: a pickle may name the same ones many times."""
    parts = value if isinstance(value, tuple) else (value,)
    held = [part.text if isinstance(part, HeldBytes) else part for part in parts]
    return sum(len(part) >> 10 for part in held if isinstance(part, str | bytes | bytearray))


def _push(reader: PickleReader, value: object) -> None:
    reader.stack.append(value)


def _tuple_of(count: int) -> Callable[[PickleReader, Any], None]:
    return lambda reader, _: reader.stack.append(tuple(_pop(reader, count) if count else ()))


_CONSTANTS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT"
)
_STEPS: dict[str, Callable[[PickleReader, Any], object]] = {
    **dict.fromkeys(_CONSTANTS.split(), _push),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda reader, place: _push(reader, reader.memo[int(place)])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _keep),
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, _: None),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _call),
    "NEWOBJ_EX": _call_named,
    "NONE": lambda reader, _: reader.stack.append(None),
    "NEWTRUE": lambda reader, _: reader.stack.append(True),
    "NEWFALSE": lambda reader, _: reader.stack.append(False),
    "EMPTY_LIST": lambda reader, _: reader.stack.append([]),
    "EMPTY_SET": lambda reader, _: reader.stack.append([]),
    "EMPTY_DICT": lambda reader, _: reader.stack.append({}),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.since_mark())),
    "LIST": lambda reader, _: reader.stack.append(reader.since_mark()),
    "FROZENSET": lambda reader, _: reader.stack.append(reader.since_mark()),
    "DICT": _dictionary,
    "MARK": lambda reader, _: reader.stack.append(_Mark()),
    "POP": lambda reader, _: reader.stack.pop(),
    "POP_MARK": lambda reader, _: reader.since_mark(),
    "DUP": lambda reader, _: reader.stack.append(reader.stack[-1]),
    "APPEND": lambda reader, _: _extend(reader, _pop(reader, 1)),
    "APPENDS": lambda reader, _: _extend(reader, reader.since_mark()),
    "ADDITEMS": lambda reader, _: _extend(reader, reader.since_mark()),
    "SETITEM": lambda reader, _: _set_items(reader, _pop(reader, 2)),
    "SETITEMS": lambda reader, _: _set_items(reader, reader.since_mark()),
    "GLOBAL": lambda reader, text: reader.name(text.replace(" ", ".")),
    "STACK_GLOBAL": _name_of_two,
    "INST": _make_instance,
    "OBJ": _make_object,
    "BUILD": _build,
    "BINPERSID": lambda reader, _: reader.stack.append(reader.find(reader.stack.pop())),
    "PERSID": lambda reader, key: reader.stack.append(reader.find(key)),
}
