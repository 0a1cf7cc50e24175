"""What the commands do: run orders and give their tables, collect what is stored, write the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit_ot import MergeotError, PluginManager, RecipeError, write_text
from mergekit_ot.errors import unknown_name
from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, QUICK, Method
from mergeot_experiments.catalogue.registry import ALL, EXPERIMENTS, find_experiments
from mergeot_experiments.results.rendering import as_markdown
from mergeot_experiments.results.tables import ResultTable, Selection, make_table
from mergeot_experiments.running.progress import ProgressLine
from mergeot_experiments.running.runner import Order, run
from mergeot_experiments.running.store import Store
from mergeot_experiments.sources.data import VARIABLE
from mergeot_experiments.sources.training import cache_folder


def run_orders(
    orders: Sequence[Order], manager: PluginManager, line: ProgressLine
) -> Iterator[tuple[ResultTable | None, tuple[str, ...]]]:
    """Runs orders one after the other.

    Yields:
        After each, the table of what was ordered, and sentences on what cannot be combined.

    Raises:
        MergeotError: The data, a solver or an option is missing or wrong.
    """
    store = _store()
    for order in orders:
        _check(order, manager)
    for order in orders:
        if order.scale == DIGITS:
            line.stay(
                f"{VARIABLE} is not set: '{order.experiment.name}' runs on scikit-learn's digits with small networks. "
                "Its numbers say nothing about MNIST."
            )
        refused = run(order, store, manager, line)
        chosen = Selection(order.all_methods, order.sets)
        yield make_table(order.experiment, order.scale, store, manager, chosen), refused


def stored_tables(names: Sequence[str], manager: PluginManager) -> list[ResultTable]:
    """Returns a table for each of the experiments and scales of which something is stored.

    Raises:
        MergeotError: Nothing is, or a name is unknown.
    """
    store = _store()
    chosen = find_experiments(names or [ALL])
    # Scales share networks, also across experiments: a larger one is shown where it has something of its own.
    shown: set[int] = set()
    tables: list[ResultTable] = []
    for scale in (QUICK, DIGITS, FULL):
        at_scale = _tables_at(scale, store, manager)
        fresh = [table for table in at_scale if not shown.issuperset(map(id, table.cells))]
        tables += [table for table in fresh if table.experiment in chosen]
        for table in fresh:
            shown.update(map(id, table.cells))
    tables.sort(key=lambda table: chosen.index(table.experiment))
    if not tables:
        raise MergeotError(
            f"Nothing is measured yet of {', '.join(names) or 'any experiment'} (looked in '{cache_folder()}'). "
            f"Run: mergeot experiments run {names[0] if names else 'mlp'}"
        )
    return tables


def _tables_at(scale: str, store: Store, manager: PluginManager) -> list[ResultTable]:
    """Returns a table for each experiment of which something is stored at a scale."""
    experiments = [experiment for experiment in EXPERIMENTS.values() if scale in experiment.designs]
    tables = [make_table(experiment, scale, store, manager) for experiment in experiments]
    return [table for table in tables if table is not None]


def write_page(tables: Sequence[ResultTable], path: Path, *, overwrite: bool = False) -> None:
    """Writes the tables as a page of markdown; a file that mergeot did not write is replaced with `overwrite` only.

    Raises:
        MergeotError: It cannot be written.
    """
    write_text(path, as_markdown(tables), comment="<!-- {} -->", overwrite=overwrite)


def _store() -> Store:
    return Store(cache_folder() / "results")


def _check(order: Order, manager: PluginManager) -> None:
    """Finds what is wrong with an order before an hour of training does."""
    _ = order.sets
    for method in order.all_methods:
        _check_options(method, manager)
        if method.repair not in (None, "none"):
            manager.get("repair", method.repair)


def _check_options(method: Method, manager: PluginManager) -> None:
    known = [field.name for field in dataclasses.fields(manager.get("solver", method.solver))]
    for name in method.options:
        if name not in known:
            raise RecipeError(unknown_name(f"option of solver '{method.solver}'", name, known))
