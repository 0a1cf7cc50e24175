"""What networks have in common, and how to fuse them: looked at before any fusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mergekit_ot import (
    FusionInputs,
    FusionOptions,
    FusionResult,
    MergeotError,
    ModelGraph,
    Notify,
    PluginManager,
    RecipeError,
    SourceModel,
    default_manager,
    fuse_with,
    trace_model,
)
from mergeot_diagnose.findings import Basin, Diagnosis, LayerSimilarity, PairDiagnosis
from mergeot_diagnose.network import kind_of
from mergeot_diagnose.paths import Path, aligned_path, naive_path
from mergeot_diagnose.rules import Facts, advise
from mergeot_diagnose.samples import Samples, answers_of, read_samples
from mergeot_diagnose.similarity import layer_similarities
from mergeot_diagnose.weights import WeightComparison, compare_weights

# Shares of what an alignment can gain that is there already. Of the pairs that were looked at, trainings of their own
# have less than 0.03 and those from one start 1.
_SURELY_APART, _SURELY_ONE = 0.3, 0.8
_MATCHING = {"solver": "weight-matching", "solver_options": {"symmetry": "permutation"}}


def _silent(_: str) -> None:
    """Tells nobody."""


def diagnose(
    models: Sequence[nn.Module | SourceModel],
    *,
    example_inputs: Tensor | tuple[object, ...] | None = None,
    data: Iterable[Any] | None = None,
    most_samples: int = 500,
    seed: int = 0,
    manager: PluginManager | None = None,
    notify: Notify = _silent,
) -> Diagnosis:
    """Looks at networks before they are fused: are they in one basin, how similar are their layers, what is advised.

    Args:
        models: Two or more: modules, or `SourceModel`.
        example_inputs: Inputs to trace them with; those of `data` where they are not given.
        data: Batches of inputs, or of (inputs, targets). With targets, barriers are those of the loss and the error;
            without, what all networks say together stands for them.
        most_samples: Samples of `data` at most.
        seed: Seed of the random order that weights are compared with.
        manager: The plugins to use; the installed ones by default.
        notify: Told what is looked at.

    Raises:
        MergeotError: There are fewer than two networks, neither inputs nor data, or a network cannot be traced.

    Example:
        >>> import torch
        >>> nets = [nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2)]
        >>> found = diagnose(nets, data=[torch.randn(64, 4)])
        >>> found.samples, [layer.name for layer in found.pairs[0].layers], found.pairs[0].layers[0].cka > 0
        (64, ['0.weight:0'], True)
    """
    if len(models) < 2:
        raise RecipeError("A diagnosis compares networks: give two or more.")
    samples = None if data is None else read_samples(data, most_samples)
    inputs = example_inputs if samples is None else samples.inputs[0]
    if inputs is None:
        raise RecipeError("Nothing says what the networks take: give example_inputs, or data.")
    sources = [SourceModel.of(model, f"source {number}") for number, model in enumerate(models)]
    return _Examination(sources, inputs, samples, seed, manager or default_manager(), notify).diagnosis()


@dataclass(frozen=True)
class _Matched:
    """A network aligned to the first by its weights, or why it could not be."""

    other: SourceModel
    head: str
    result: FusionResult | None
    note: str = ""


@dataclass(frozen=True)
class _Examination:
    """What a diagnosis is made of."""

    sources: Sequence[SourceModel]
    inputs: Tensor | tuple[object, ...]
    samples: Samples | None
    seed: int
    manager: PluginManager
    notify: Notify

    def diagnosis(self) -> Diagnosis:
        """Returns what was found."""
        matched = [self._matched(other) for other in self.sources[1:]]
        results = [found.result for found in matched if found.result is not None]
        kind = kind_of(results[0].alignment.graphs[0] if results else self._graph())
        models = [source.instance() for source in self.sources] if self.samples else []
        answers = answers_of(models, self.samples) if self.samples else None
        targets: Sequence[Tensor] = ()
        if self.samples is not None and answers is not None:
            targets = self.samples.targets or answers.together
        notes = [found.note for found in matched if found.note]
        pairs = tuple(self._pair(found, targets, notes) for found in matched)
        disagreement = answers.disagreement if answers else None
        facts = Facts(
            kind,
            _all_in_one(pairs),
            self.samples is not None,
            all(_have_equal_sizes(pair) for pair in pairs),
            all(found.head == "one" for found in matched),
            disagreement is not None and disagreement.saw_different_things,
        )
        is_labelled = self.samples is not None and bool(self.samples.targets)
        return Diagnosis(
            tuple(source.name for source in self.sources),
            kind,
            pairs,
            _accuracies(pairs) if is_labelled else None,
            is_labelled,
            None if disagreement is None else disagreement.share,
            facts.saw_different_things,
            0 if self.samples is None else self.samples.count,
            advise(facts),
            tuple(notes),
        )

    def _graph(self) -> ModelGraph:
        return trace_model(self.sources[0].instance(), self.inputs, self.manager)  # type: ignore[arg-type]

    def _matched(self, other: SourceModel) -> _Matched:
        """Returns both aligned by their weights, each in its own form, so that equal places mean something."""
        inputs = FusionInputs([self.sources[0], other], example_inputs=self.inputs, may_rewrite=False)  # type: ignore[arg-type]
        self.notify(f"Comparing the weights of {self.sources[0].name} and {other.name} …")
        note = ""
        for head in ("one", "both"):
            try:
                result = fuse_with(inputs, FusionOptions(**_MATCHING, head=head), manager=self.manager)
                return _Matched(other, head, result)
            except MergeotError as error:
                # That heads differ is no reason; why they cannot be aligned otherwise is.
                note = note or f"{self.sources[0].name} and {other.name} could not be aligned by weights: {error}"
        return _Matched(other, "one", None, note)

    def _pair(self, matched: _Matched, targets: Sequence[Tensor], notes: list[str]) -> PairDiagnosis:
        pair, result = (self.sources[0], matched.other), matched.result
        names = (pair[0].name, pair[1].name)
        if result is None:
            return PairDiagnosis(names, Basin.UNKNOWN, None, (), None, None, "")
        weights = compare_weights(result, self.seed)
        if self.samples:
            self.notify(f"Comparing both on {self.samples.count} samples …")
        similar = layer_similarities(result, self.samples) if self.samples else {}
        layers = tuple(_layers(result, weights, similar))
        naive = aligned = None
        solver = "activation-matching"
        if self.samples is not None and targets and weights.cosine is not None and matched.head == "one":
            naive = naive_path(*pair, self.samples, targets)
            if not naive.is_flat:
                try:
                    aligned = aligned_path(pair, self.samples, targets, solver, self.manager)
                except MergeotError as error:
                    notes.append(f"The path after {solver} was not measured: {error}")
        return PairDiagnosis(names, _basin(weights, naive), weights, layers, naive, aligned, solver)


def _layers(result: FusionResult, weights: WeightComparison, similar: dict[str, float]) -> Iterable[LayerSimilarity]:
    first, second = result.alignment.graphs[:2]
    for key, group in result.alignment.target.free_groups.items():
        if not group.context:
            sizes = (first.groups[key].size, second.groups[key].size)
            yield LayerSimilarity(key, sizes, weights.same_place.get(key), similar.get(key))


def _basin(weights: WeightComparison, naive: Path | None) -> Basin:
    is_in_own_order = weights.held is not None and weights.held <= _SURELY_APART
    if naive is not None and naive.is_flat:
        # A flat path between neurons in orders of their own is one of easy data, and says little of others.
        return Basin.UNKNOWN if is_in_own_order else Basin.ONE
    if naive is not None or is_in_own_order:
        return Basin.APART
    return Basin.ONE if weights.held is not None and weights.held >= _SURELY_ONE else Basin.UNKNOWN


def _all_in_one(pairs: Sequence[PairDiagnosis]) -> bool | None:
    basins = {pair.basin for pair in pairs}
    if basins == {Basin.ONE}:
        return True
    return False if Basin.APART in basins else None


def _have_equal_sizes(pair: PairDiagnosis) -> bool:
    return all(first == second for first, second in (layer.sizes for layer in pair.layers))


def _accuracies(pairs: Sequence[PairDiagnosis]) -> tuple[float, ...] | None:
    """Returns the accuracy of each network: both ends of every path, the first network's once."""
    paths = [pair.naive.accuracy for pair in pairs if pair.naive is not None]
    if len(paths) != len(pairs) or any(each is None for each in paths):
        return None
    known = [each for each in paths if each is not None]
    return (known[0][0], *(each[-1] for each in known))
