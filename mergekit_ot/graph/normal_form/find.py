"""Finds the normal form of a model's states: guessed from its program, proven by running it with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.normal_form.attention import guess_moves
from mergekit_ot.graph.normal_form.centring import CentreGuess, guess_centres
from mergekit_ot.graph.normal_form.folds import guess_folds
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.normal_form.maps import ProgramView
from mergekit_ot.graph.normal_form.norms import find_norms
from mergekit_ot.graph.normal_form.rewrites import AbstractRewrite, Centre, Fold, MoveBias, Refusal
from mergekit_ot.graph.symmetry.cases import REFUSED, OtherCase
from mergekit_ot.graph.symmetry.proof import UPCAST_TOLERANCE, Comparison, Proof, longer


def find_normal_form(
    graph: ModelGraph, make: Callable[[], nn.Module], inputs: tuple[object, ...], seed: int = 0
) -> NormalForm:
    """Finds the rewrites that bring any state of a model into its normal form without changing its function.

    Gains and biases of norms are folded into the linear maps that read them, streams that only LayerNorms read are
    centred, and biases that attention passes on or does not see go away. Each rewrite is guessed from the data flow of
    the program and proven by running fresh instances with random weights in float64.

    Args:
        graph: What `mergekit_ot.trace_model` says of the model, with its program.
        make: Gives a fresh instance each time.
        inputs: Inputs of the shapes that the model takes.
        seed: Seed of the random weights and inputs of the proof.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> make = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> find_normal_form(trace_model(make(), torch.randn(4, 3)), make, (torch.randn(4, 3),)).rewrites
        ()
    """
    view = ProgramView(graph)
    norms = find_norms(view)
    folds, refusals = guess_folds(view, norms)
    moves, unmoved = guess_moves(view)
    centres = guess_centres(view, norms, folds)
    rewrites = [*(guess.fold for guess in folds), *moves, *centres.centres.values()]
    if not rewrites:
        return _form(view, [], centres, [*refusals, *unmoved])
    proof = _RewriteProof(graph, make, inputs, seed)
    if proof.holds(rewrites):
        return _form(view, rewrites, centres, [*refusals, *unmoved])
    kept = proof.kept([], [*(guess.fold for guess in folds), *moves])
    # What reads a norm may be centred only where its gain is folded.
    centres = guess_centres(view, norms, [guess for guess in folds if guess.fold in kept])
    rewrites = proof.kept(kept, list(centres.centres.values()))
    return _form(view, rewrites, centres, [*refusals, *unmoved, *proof.refusals])


def _form(
    view: ProgramView, rewrites: Sequence[AbstractRewrite], centres: CentreGuess, refusals: Sequence[Refusal]
) -> NormalForm:
    neutral: dict[str, list[str]] = {}
    for rewrite in rewrites:
        for name in (rewrite.gain, rewrite.bias) if isinstance(rewrite, Fold) else ():
            for key in view.groups_on(name, len(view.graph_shape(name)) - 1) if name is not None else ():
                neutral.setdefault(key, []).append(name)  # type: ignore[arg-type]
    centred = frozenset(key for key, centre in centres.centres.items() if centre in rewrites and key in centres.whole)
    all_refusals = tuple(dict.fromkeys((*refusals, *centres.refusals)))
    return NormalForm(tuple(rewrites), all_refusals, {key: tuple(names) for key, names in neutral.items()}, centred)


class _RewriteProof:
    """Proves rewrites at random weights and inputs of several shapes, and says why some are refused.

    Args:
        graph: The model's graph.
        make: Gives a fresh instance.
        inputs: Inputs of the shapes that it takes.
        seed: Seed of weights and inputs.
    """

    def __init__(self, graph: ModelGraph, make: Callable[[], nn.Module], inputs: tuple[object, ...], seed: int) -> None:
        self.refusals: list[Refusal] = []
        self._graph = graph
        self._why = ""
        self._draws: list[tuple[Comparison, float]] = []
        try:
            proof = Proof(make, inputs, seed)
            # At another shape a model may round where it does not at the traced one: places that are interpolated.
            self._draws = [(proof, proof.tolerance), (_at_other_shape(proof), UPCAST_TOLERANCE)]
        except REFUSED as error:
            self._why = f"The model cannot be run with random weights, so nothing is proven: {error}"
        else:
            if not proof.is_repeatable:
                self._draws, self._why = [], "Two runs of the model with the same weights differ, so nothing is proven."

    def holds(self, rewrites: Sequence[AbstractRewrite]) -> bool:
        """Whether these rewrites together keep the function."""
        form = NormalForm(tuple(rewrites))
        try:
            return bool(self._draws) and all(self._keeps(draw, form, tolerance) for draw, tolerance in self._draws)
        except REFUSED:
            return False

    def _keeps(self, draw: Comparison, form: NormalForm, tolerance: float) -> bool:
        return draw.change(form.of_state(self._tied(draw.state))) <= tolerance

    def _tied(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns random weights with those of tied parameters alike: the last one loaded counts."""
        last = {self._graph.aliases.get(name, name): value for name, value in state.items()}
        return {name: last[self._graph.aliases.get(name, name)] for name in state}

    def kept(self, kept: list[AbstractRewrite], more: list[AbstractRewrite]) -> list[AbstractRewrite]:
        """Returns the rewrites that keep the function, in order, given that the first ones do."""
        if not more or self.holds([*kept, *more]):
            return [*kept, *more]
        if len(more) == 1:
            self.refusals.append(Refusal(_subject(more[0]), self._why or _UNPROVEN))
            return kept
        middle = len(more) // 2
        return self.kept(self.kept(kept, more[:middle]), more[middle:])


def _at_other_shape(proof: Proof) -> Comparison:
    """Returns runs on inputs that are longer along the first axis that allows it; of a larger batch if none does.

    What holds at the traced shape only (where nothing has to be padded, say) is no rewrite.
    """
    rank = min((x.ndim for x in proof.inputs if isinstance(x, Tensor)), default=0)
    for axis in (*range(1, rank), 0):
        inputs = [longer(x, axis, is_doubled=axis > 0) if isinstance(x, Tensor) else x for x in proof.inputs]
        try:
            return OtherCase("at another shape", proof, inputs)
        except REFUSED:
            continue
    return proof


_UNPROVEN = "The rewrite that the data flow suggests changes the function when the model is run with random weights."


def _subject(rewrite: AbstractRewrite) -> str:
    """Returns the parameter that a rewrite is about."""
    if isinstance(rewrite, Fold):
        return rewrite.gain or rewrite.bias or ""
    if isinstance(rewrite, MoveBias):
        return rewrite.bias
    return rewrite.places[0].name if isinstance(rewrite, Centre) else min(rewrite.names)
