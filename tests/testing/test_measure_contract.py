"""`check_measure` passes our measures, and each clause of it fails a measure that breaks that clause alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from mergekit_ot import AbstractNodeMeasure, GroupView, NeuronMeasure, PluginManager, default_manager, hookimpl
from mergekit_ot.errors import PluginError, RecipeError
from mergekit_ot.testing import check_measure

OURS = ("weights", "importance", "activations", "correlations", "weights+activations")


@pytest.mark.parametrize("name", OURS)
def test_our_measures_keep_the_contract(name: str) -> None:
    check_measure(name)


def test_all_registered_measures_are_checked() -> None:
    assert set(default_manager().node_measures) == set(OURS)


class Right(AbstractNodeMeasure):
    """The least that satisfies the contract."""

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        return tuple(NeuronMeasure.uniform(view.weights(i), view.structure(i)) for i in range(view.count))


class Directions(Right):
    def measure(self, view):
        return tuple(replace(each, support=normalize(each.support)) for each in super().measure(view))


class Heavier(Right):
    """Masses by the length of a neuron's weights: not uniform, and right."""

    def measure(self, view):
        def mass(support):
            lengths = support.norm(dim=1) + 0.1
            return lengths / lengths.sum()

        return tuple(replace(each, mass=mass(each.support)) for each in super().measure(view))


class LosesASource(Right):
    def measure(self, view):
        return super().measure(view)[:1]


class LosesANeuron(Right):
    def measure(self, view):
        return tuple(NeuronMeasure.uniform(view.weights(i)[1:]) for i in range(view.count))


class CutsTheStructure(Right):
    def measure(self, view):
        return tuple(
            replace(each, structure=None if each.structure is None else each.structure[:, 1:])
            for each in super().measure(view)
        )


class CountsItsColumns(Right):
    """One source gets a column more."""

    def measure(self, view):
        first, *others = super().measure(view)
        return (replace(first, support=torch.cat([first.support, first.support[:, :1]], 1)), *others)


class StructuresTheFirst(Right):
    def measure(self, view):
        first, *others = super().measure(view)
        return (first, *(replace(other, structure=None) for other in others))


class IsNotFinite(Right):
    def measure(self, view):
        return tuple(replace(each, support=each.support / 0) for each in super().measure(view))


class WeighsTooMuch(Right):
    def measure(self, view):
        return tuple(replace(each, mass=2 * each.mass) for each in super().measure(view))


class WeighsLessThanNothing(Right):
    def measure(self, view):
        def mass(size):
            return torch.tensor([-1.0, 2.0] + [0.0] * (size - 2))

        return tuple(replace(each, mass=mass(each.mass.numel())) for each in super().measure(view))


class TellsSourcesApart(Right):
    def measure(self, view):
        return tuple(replace(each, support=each.support + place) for place, each in enumerate(super().measure(view)))


class LooksAtPlaces(Right):
    """A neuron is also where it stands, which a reorder changes."""

    def measure(self, view):
        return tuple(
            replace(each, support=torch.cat([each.support, torch.arange(each.size)[:, None]], 1))
            for each in super().measure(view)
        )


class WeighsByPlace(Right):
    def measure(self, view):
        def mass(size):
            return torch.arange(1.0, size + 1) / sum(range(1, size + 1))

        return tuple(replace(each, mass=mass(each.size)) for each in super().measure(view))


class StructuresByPlace(Right):
    def measure(self, view):
        return tuple(
            replace(each, structure=torch.arange(float(each.size**2)).reshape(1, each.size, each.size))
            for each in super().measure(view)
        )


class WritesIntoItsSources(Right):
    def measure(self, view):
        for _, block in view.blocks(view.count - 1):
            block.view.mul_(2)
        return super().measure(view)


class IsRandom(Right):
    def measure(self, view):
        return tuple(
            replace(each, support=each.support + 1e-7 * torch.rand(each.support.shape))
            for each in super().measure(view)
        )


class ForgetsToAskForData(Right):
    def measure(self, view):
        return tuple(NeuronMeasure.uniform(rows) for rows in view.activations())  # type: ignore[union-attr]


class ForgetsThatNothingMayReadThem(ForgetsToAskForData):
    needs_data = True


@pytest.mark.parametrize("measure", [Right, Directions, Heavier])
def test_right_measures_pass(measure) -> None:
    check_measure(measure())


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        (LosesASource, "1 measures for 2 sources"),
        (LosesANeuron, "supports and masses have sizes"),
        (CutsTheStructure, "a structure has shape"),
        (CountsItsColumns, r"the supports have \[\d+, \d+\] columns"),
        (StructuresTheFirst, r"the structures have \[1, None\] matrices"),
        (IsNotFinite, "holds NaN or infinity"),
        (WeighsTooMuch, "sum to 2"),
        (WeighsLessThanNothing, "has a negative mass"),
        (TellsSourcesApart, "Identical sources give identical supports"),
        (LooksAtPlaces, "the distances between neurons changed"),
        (WeighsByPlace, "the masses did not follow"),
        (StructuresByPlace, "the structure did not follow"),
        (WritesIntoItsSources, "was changed in place"),
        (IsRandom, "a second call gave something else"),
        (ForgetsToAskForData, "for an MLP, .* the measure raised TypeError"),
        (ForgetsThatNothingMayReadThem, "for neurons that nothing reads, .* the measure raised TypeError"),
    ],
)
def test_each_clause_fails_the_measure_that_breaks_it(broken, clause) -> None:
    with pytest.raises(PluginError, match=clause) as raised:
        check_measure(broken())
    assert f"The node measure '{broken.__name__}' breaks its contract. The clause: " in str(raised.value)


def test_a_measure_is_found_by_its_name_in_the_given_manager() -> None:
    import mergeot_layers

    class Extra:
        @hookimpl
        def mergeot_node_measures(self):
            return {"random": IsRandom}

    manager = PluginManager([mergeot_layers, Extra()])
    with pytest.raises(PluginError, match="The node measure 'random' breaks its contract"):
        check_measure("random", manager=manager)
    with pytest.raises(RecipeError, match="Did you mean 'random'"):
        check_measure("randon", manager=manager)
