"""The contracts of tensor stores and their writers, clause by clause."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergekit_ot.errors import PluginError
from mergekit_ot.storage.store import MemoryStore, StoreWriter, TensorStore
from mergekit_ot.testing.clauses import Contract, raised_by

_NO_SUCH_NAME = "no tensor has this name"


def check_store(store: TensorStore) -> None:
    """Checks a store of tensors; it is left open and unchanged.

    The clauses: it is a mapping of its names; a name that it does not have is a `KeyError`; shapes and types agree
    with what is read; a second read gives the same; a part is that part of the whole; the digest is a SHA-256 and
    stays; it can be pickled, and what comes back has the same tensors and the same digest; a closed one is empty.

    Args:
        store: The store, with at least one tensor; better with scalars and tensors of several types.

    Raises:
        PluginError: A clause is broken; the message says which, and for which tensor.

    Example:
        >>> from mergekit_ot import MemoryStore
        >>> check_store(MemoryStore({"weight": torch.ones(3, 2), "steps": torch.tensor(5)}))
    """
    if not len(store):
        raise PluginError("A store without tensors shows nothing. Give check_store one that holds some.")
    contract = _contract(f"The store '{type(store).__name__}'", "check_store")
    for clause in _STORE_CLAUSES:
        contract.check(clause, store)


def check_writer(make_writer: Callable[[], StoreWriter]) -> None:
    """Checks a writer by what can be read back.

    The clauses: what was given stays untouched; everything that was written is there, with its type and to the bit
    (views, scalars, narrow floats, one tensor under two names); closing twice does nothing more; where a block
    raises, the writer does not hide it; what is reopened keeps the contract of a store.

    Args:
        make_writer: Gives a new writer each time it is called, to a place of its own.

    Raises:
        PluginError: A clause is broken; the message says which, and for which tensor.

    Example:
        >>> from mergekit_ot.storage.store import MemoryWriter
        >>> check_writer(MemoryWriter)
    """
    contract = _contract(f"The writer '{type(make_writer()).__name__}'", "check_writer")
    for clause in _WRITER_CLAUSES:
        contract.check(clause, make_writer)


def _contract(subject: str, function: str) -> Contract:
    advice = f"Correct it; the clauses are listed in mergekit_ot.testing.{function}."
    return Contract(subject, advice, blame=raised_by("it"))


def _maps_its_names(store: TensorStore) -> str | None:
    """A store is a mapping of its names, each once."""
    names = list(store.names)
    if len(set(names)) != len(names):
        return f"names are given twice: {names}"
    if list(store) != names or len(store) != len(names) or list(dict(store)) != names:
        return f"iterating gives {list(store)}, the names are {names}"
    lost = [name for name in names if name not in store]
    return f"'{lost[0]}' is one of the names, but not in the store" if lost else None


def _refuses_other_names(store: TensorStore) -> str | None:
    """A name that is not there is a KeyError, for every question."""
    if _NO_SUCH_NAME in store:
        return "a name that does not exist is said to be in the store"
    questions: dict[str, Callable[[], object]] = {
        "shape": lambda: store.shape(_NO_SUCH_NAME),
        "dtype": lambda: store.dtype(_NO_SUCH_NAME),
        "read": lambda: store.read(_NO_SUCH_NAME),
        "slice": lambda: store.slice(_NO_SUCH_NAME, 0, 1),
    }
    for question, ask in questions.items():
        try:
            ask()
        except KeyError:
            continue
        return f"{question} of a name that does not exist raised no KeyError"
    return None


def _announces_what_it_reads(store: TensorStore) -> str | None:
    """Shapes and types are those of the tensors that are read."""
    for name in store.names:
        tensor = store.read(name)
        if tuple(store.shape(name)) != tuple(tensor.shape):
            return f"the shape of '{name}' is said to be {tuple(store.shape(name))}, it is {tuple(tensor.shape)}"
        if store.dtype(name) != tensor.dtype:
            return f"the type of '{name}' is said to be {store.dtype(name)}, it is {tensor.dtype}"
    return None


def _reads_the_same_again(store: TensorStore) -> str | None:
    """A second read gives the same tensor, to the bit."""
    return _first_difference(store, dict(store))


def _slices_what_it_reads(store: TensorStore) -> str | None:
    """A part is that part of the whole; a scalar has none, and that is an IndexError."""
    for name in store.names:
        whole = store.read(name)
        if whole.dim() == 0:
            try:
                store.slice(name, 0, 1)
            except IndexError:
                continue
            return f"the scalar '{name}' was cut"
        size = len(whole)
        for start, stop in ((0, size), (0, 1), (size - 1, size), (size // 2, size // 2), (0, size + 3)):
            if not _is_equal(store.slice(name, start, stop), whole[start:stop]):
                return f"entries {start} to {stop} of '{name}' are not those of the whole"
    return None


def _has_a_digest(store: TensorStore) -> str | None:
    """The digest is a SHA-256 in hexadecimal digits, the same each time."""
    digest = store.digest()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return f"it is '{digest}'"
    return None if store.digest() == digest else "it changed between two questions"


def _can_be_sent(store: TensorStore) -> str | None:
    """A store can be pickled; what comes back has the same tensors in the same order, and the same digest."""
    sent = pickle.loads(pickle.dumps(store))
    if list(sent.names) != list(store.names):
        return f"the names were {list(store.names)}, what came back has {list(sent.names)}"
    if sent.digest() != store.digest():
        return f"the digest was {store.digest()}, that of what came back is {sent.digest()}"
    return _first_difference(sent, store)


def _closes(store: TensorStore) -> str | None:
    """A closed store has no tensors, and closing it again does nothing; others of the same tensors stay open."""
    other = pickle.loads(pickle.dumps(store))
    with other:
        pass
    other.close()
    if len(other):
        return f"{len(other)} tensors are left"
    return None if len(store) and dict(store) else "another store of the same tensors was closed with it"


def _keeps_what_is_written(make_writer: Callable[[], StoreWriter]) -> str | None:
    """All that was written can be read back, with its type and to the bit."""
    state = _sample()
    store = _written(make_writer(), state)
    if set(store.names) != set(state):
        return f"written were {sorted(state)}, what is there is {sorted(store.names)}"
    return _first_difference(store, state)


def _leaves_what_it_is_given(make_writer: Callable[[], StoreWriter]) -> str | None:
    """What is given to a writer is not changed."""
    state = _sample()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    _written(make_writer(), state)
    return _first_difference(MemoryStore(state), kept)


def _closes_once(make_writer: Callable[[], StoreWriter]) -> str | None:
    """Closing a writer again changes nothing."""
    writer, state = make_writer(), _sample()
    _written(writer, state)
    writer.close()
    return _first_difference(writer.reopened(), state)


def _lets_errors_through(make_writer: Callable[[], StoreWriter]) -> str | None:
    """An error that a block raises is not hidden by the writer."""
    try:
        with make_writer() as writer:
            writer.write("weight", torch.ones(2))
            raise LookupError("of the block")
    except LookupError:
        return None
    except Exception as error:
        return f"a LookupError of the block became {type(error).__name__}: {error}"
    return "a LookupError of the block was lost"


def _reopens_as_a_store(make_writer: Callable[[], StoreWriter]) -> str | None:
    """What is reopened keeps the contract of a store."""
    try:
        check_store(_written(make_writer(), _sample()))
    except PluginError as error:
        return str(error)
    return None


_STORE_CLAUSES = (
    _maps_its_names,
    _refuses_other_names,
    _announces_what_it_reads,
    _reads_the_same_again,
    _slices_what_it_reads,
    _has_a_digest,
    _can_be_sent,
    _closes,
)
_WRITER_CLAUSES = (
    _leaves_what_it_is_given,
    _keeps_what_is_written,
    _closes_once,
    _lets_errors_through,
    _reopens_as_a_store,
)


def _sample() -> dict[str, Tensor]:
    """Returns a state with all that models have: views with gaps, scalars, narrow floats, a tensor under two names."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator)
    return {
        "weight": weight,
        "tied": weight,
        "transposed": torch.randn(5, 2, generator=generator).T,
        "view": torch.randn(100, 2, generator=generator)[3:5],
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "double": torch.randn(2, 1, 2, generator=generator).double(),
        "norm.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


def _written(writer: StoreWriter, state: Mapping[str, Tensor]) -> TensorStore:
    with writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    return writer.reopened()


def _first_difference(store: TensorStore, expected: Mapping[str, Tensor]) -> str | None:
    for name, tensor in expected.items():
        if not _is_equal(store.read(name), tensor):
            return f"'{name}' differs"
    return None


def _is_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same to the bit: NaN is equal to itself, and zero differs from minus zero."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    rows = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(*rows)
