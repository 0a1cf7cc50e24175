"""Files of exported programs that run code, or try to, when they are loaded in the usual way; made for tests.

Each leaves a file behind where its code ran. None does harm.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL, TABLE = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHT = "data/weights/weight_0"
# A module that a file names; importing it leaves the file too.
MODULE = "module_that_a_file_names"


class Plain(nn.Module):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(inputs)))


SOURCE = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))
"""


def harmless_program(path: Path) -> Path:
    """Writes a program as anybody would."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Plain().eval(), (torch.randn(2, 3),)), path)
    return path


@dataclass
class Program:
    """The members of a program's file, to be changed.

    Attributes:
        members: Name without the archive's folder → content.
        mark: The file that code in it is to leave behind.
        doubles: Members that are written once more, at the end.
        compressed: Names of members that are compressed.
    """

    members: dict[str, bytes]
    mark: Path
    doubles: list[tuple[str, bytes]] = field(default_factory=list)
    compressed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, mark: Path) -> Program:
        """Takes a file apart."""
        with zipfile.ZipFile(path) as archive:
            return cls({name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}, mark)

    def write(self, path: Path) -> Path:
        """Puts the file together."""
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that two members have one name
            for name, content in [*self.members.items(), *self.doubles]:
                kind = zipfile.ZIP_DEFLATED if name in self.compressed else zipfile.ZIP_STORED
                archive.writestr(f"a/{name}", content, kind)
        return path

    @property
    def expression(self) -> str:
        """Python that leaves the mark and is 4."""
        return f"len([__import__('pathlib').Path({str(self.mark)!r}).touch()] * 4)"

    @property
    def command(self) -> str:
        """The same for a shell."""
        return f"touch {self.mark}"

    def edit(self, name: str, change: Callable[[Any], object]) -> None:
        """Changes a member that is JSON."""
        content = json.loads(self.members[name])
        change(content)
        self.members[name] = json.dumps(content).encode()

    def edit_weight(self, **settings: object) -> None:
        """Changes what the table says of the first weight."""
        self.edit(TABLE, lambda table: next(iter(table["config"].values())).update(settings))

    def edit_shape(self, **settings: object) -> None:
        """Changes what the table says of the first weight's shape and type."""
        self.edit(TABLE, lambda table: next(iter(table["config"].values()))["tensor_meta"].update(settings))


class Runs:
    """What a pickle of this runs when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _pickled(program: Program, protocol: int) -> bytes:
    return pickle.dumps(Runs(program.command), protocol)


def _by_a_name_of_torch(program: Program) -> bytes:
    """A pickle that takes os.system as an attribute of a module of torch."""
    names = [pickle.SHORT_BINUNICODE + bytes([len(name)]) + name for name in (b"torch.serialization", b"os.system")]
    command = program.command.encode()
    argument = pickle.BINUNICODE + len(command).to_bytes(4, "little") + command
    return pickle.PROTO + b"\x04" + b"".join(names) + pickle.STACK_GLOBAL + argument + pickle.TUPLE1 + b"R."


def _saved(program: Program) -> bytes:
    stream = io.BytesIO()
    torch.save({"inputs": Runs(program.command)}, stream)
    return stream.getvalue()


def _first_value(program: Program, key: str, value: object) -> None:
    def change(content: Any) -> None:
        values = content["graph_module"]["graph"]["tensor_values"]
        values["linear"][key] = value

    program.edit(MODEL, change)


def _sizes(program: Program) -> None:
    _first_value(program, "sizes", [{"as_expr": {"expr_str": program.expression, "hint": None}}, {"as_int": 4}])


def _strides(program: Program) -> None:
    _first_value(program, "strides", [{"as_expr": {"expr_str": program.expression, "hint": None}}, {"as_int": 1}])


def _offset(program: Program) -> None:
    _first_value(program, "storage_offset", {"as_expr": {"expr_str": program.expression, "hint": {"as_int": 0}}})


def _symbols(kind: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        symbol = {"as_expr": {"expr_str": program.expression, "hint": None}}
        program.edit(MODEL, lambda model: model["graph_module"]["graph"][kind].update({"s": symbol}))

    return change


def _ranges(program: Program) -> None:
    key = program.expression
    program.edit(MODEL, lambda model: model["range_constraints"].update({key: {"min_val": 2, "max_val": 9}}))


def _guards(code: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.edit(MODEL, lambda model: model["guards_code"].append(code.format(expression=program.expression)))

    return change


def _pickled_weight(make: Callable[[Program], bytes], use_pickle: object = True) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.members[WEIGHT] = make(program)
        program.edit_weight(use_pickle=use_pickle)

    return change


def _constant(place: str, make: Callable[[Program], bytes]) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.members[f"data/constants/{place}"] = make(program)
        entry = {"path_name": place, "is_param": False, "use_pickle": True, "tensor_meta": None}
        program.edit(CONSTANTS, lambda table: table["config"].update({"c": entry}))

    return change


def _member(name: str, make: Callable[[Program], bytes]) -> Callable[[Program], None]:
    return lambda program: program.members.update({name: make(program)})


def _spec(side: str, spec: object) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        def put(model: Any) -> None:
            model["graph_module"]["module_call_graph"][0]["signature"][side] = json.dumps([1, spec])

        program.edit(MODEL, put)

    return change


def _target(name: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.edit(MODEL, lambda model: model["graph_module"]["graph"]["nodes"][0].update({"target": name}))

    return change


def _metadata(program: Program) -> None:
    said = {"torch_fn": f"{MODULE};os.system", "nn_module_stack": program.expression, "custom": program.expression}
    program.edit(MODEL, lambda model: model["graph_module"]["graph"]["nodes"][0]["metadata"].update(said))


def _twice(program: Program) -> None:
    program.doubles.append((WEIGHT, _pickled(program, 0)))


def _bomb(name: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.members[name] = bytes(1 << 22)
        program.compressed.add(name)

    return change


def _deep(program: Program) -> None:
    program.members[TABLE] = b'{"config":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def _overlong(program: Program) -> None:
    table = json.loads(program.members[TABLE])["config"]
    program.members[TABLE] = json.dumps({"config": {program.expression * 1000: next(iter(table.values()))}}).encode()


_ENUM = {"__enum__": True, "fqn": f"{MODULE}:Kind", "name": "A"}
_LEAF = {"type": None, "context": None, "children_spec": []}
_EXPRESSION = [{"as_expr": {"expr_str": "__import__('os').getpid()", "hint": None}}, {"as_int": 3}]

# Kind → what is changed in a harmless program. The first ones run their code when torch loads them.
RUNNING: dict[str, Callable[[Program], None]] = {
    "expression as a size": _sizes,
    "expression as a stride": _strides,
    "guard": _guards("{expression} == 4"),
    "pickled weight, protocol 0": _pickled_weight(lambda program: _pickled(program, 0)),
    "pickled weight, protocol 2": _pickled_weight(lambda program: _pickled(program, 2)),
    "pickled weight, protocol 5": _pickled_weight(lambda program: _pickled(program, 5)),
    "pickled weight, a name of torch": _pickled_weight(_by_a_name_of_torch),
    "pickled weight, written by torch.save": _pickled_weight(_saved),
    "sample inputs, protocol 0": _member(SAMPLES, lambda program: _pickled(program, 0)),
    "sample inputs, written by torch.save": _member(SAMPLES, _saved),
    "opaque object": _constant("opaque_obj_0", lambda program: _pickled(program, 4)),
    "pickled constant": _constant("tensor_0", lambda program: _pickled(program, 1)),
    "weights as older torch wrote them": _member("data/weights/model.pt", lambda program: _pickled(program, 0)),
    "constants as older torch wrote them": _member("data/constants/model.pt", lambda program: _pickled(program, 0)),
}
TRYING: dict[str, Callable[[Program], None]] = {
    "expression as an offset": _offset,
    "expression among the integers": _symbols("sym_int_values"),
    "expression among the floats": _symbols("sym_float_values"),
    "expression among the booleans": _symbols("sym_bool_values"),
    "expression in a range": _ranges,
    "guard of two lines": _guards("True\n    {expression}"),
    "expression in the table of weights": lambda program: program.edit_shape(sizes=_EXPRESSION),
    "expression as a stride in the table": lambda program: program.edit_shape(strides=_EXPRESSION),
    "expression as a name": _overlong,
    "pickled weight that is called none": _pickled_weight(lambda program: _pickled(program, 0), "false"),
    "pickled weight, 0 for false": _pickled_weight(lambda program: _pickled(program, 0), 0),
    "script object": _constant("custom_obj_0", lambda program: _pickled(program, 2)),
    "enumeration of a module, outputs": _spec("out_spec", {**_LEAF, "type": "builtins.list", "context": _ENUM}),
    "enumeration of a module, inputs": _spec("in_spec", {**_LEAF, "type": "builtins.dict", "context": _ENUM}),
    "type of a module": _spec("out_spec", {**_LEAF, "type": f"{MODULE}.Kind", "context": "null"}),
    "factory of a module": _spec(
        "out_spec",
        {
            **_LEAF,
            "type": "collections.defaultdict",
            "context": json.dumps(
                {"default_factory_module": MODULE, "default_factory_name": "make", "dict_context": []}
            ),
        },
    ),
    "verifier of a module": lambda program: program.edit(MODEL, lambda model: model.update({"verifiers": [MODULE]})),
    "operation of a module": _target(f"{MODULE}.run"),
    "operation os.system": _target("os.system"),
    "operation builtins.eval": _target("builtins.eval"),
    "operation of a library": _target("torch.ops.evil.run.default"),
    "operation that loads a library": _target("torch.ops.load_library"),
    "metadata": _metadata,
    "compiled library": _member("data/aotinductor/model/m.wrapper.so", lambda program: b"\x7fELF" + bytes(64)),
    "compiled source": _member("data/aotinductor/model/m.cpp", lambda program: b"#include <cstdlib>\n"),
    "script archive": _member("code/__torch__.py", lambda program: program.expression.encode()),
    "pickle at the root": _member("data.pkl", lambda program: _pickled(program, 0)),
    "constants of a script": _member("constants.pkl", lambda program: _pickled(program, 2)),
    "module to import": _member(f"extra/{MODULE}.py", lambda program: program.expression.encode()),
    "member outside of the archive": _member(f"../../{MODULE}.py", lambda program: program.expression.encode()),
    "place outside of its folder": lambda program: program.edit_weight(path_name="../sample_inputs/model.pt"),
    "place that is absolute": lambda program: program.edit_weight(path_name="/dev/zero"),
    "place with a line break": lambda program: program.edit_weight(path_name="weight_0\n"),
    "place that is no text": lambda program: program.edit_weight(path_name=["weight_0"]),
    "member twice": _twice,
    "bomb beside the weights": _bomb("extra/zeros"),
    "bomb as a weight": _bomb(WEIGHT),
    "bomb as the table": _bomb(TABLE),
    "table that nests": _deep,
    "table that is a list": _member(TABLE, lambda program: b"[1]"),
    "table with a number of 5,000 digits": _member(TABLE, lambda program: b'{"config": ' + b"9" * 5000 + b"}"),
    "tensor of terabytes": lambda program: program.edit_shape(
        sizes=[{"as_int": 1 << 40}, {"as_int": 3}], strides=[{"as_int": 0}, {"as_int": 1}]
    ),
    "tensor behind its end": lambda program: program.edit_shape(storage_offset={"as_int": 1}),
    "tensor before its start": lambda program: program.edit_shape(storage_offset={"as_int": -4}),
    "tensor of a type that is none": lambda program: program.edit_shape(dtype=True),
    "tensor of a layout that is none": lambda program: program.edit_shape(layout=1),
}
KINDS = {**RUNNING, **TRYING}


def malicious_program(harmless: Path, kind: str, path: Path, mark: Path) -> Path:
    """Writes a program that is malicious in one way."""
    program = Program.read(harmless, mark)
    KINDS[kind](program)
    return program.write(path)
