"""Where the alignment of rotated residual streams starts: at what anchors them, or at their activations.

Embeddings, positions and heads of a language model stand beside nothing else that moves: where they have as many
numbers per neuron as the stream has neurons, they tell a rotation of it, and sweeps over all weights go on from there.
A stream with fewer (that of a vision transformer, with its patches and ten classes) is told by its activations behind
the norms, where calibration data are given, and keeps that rotation: weights alone lead it astray. Without data it
starts at what anchors it all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.calibration import calibration_batches
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.normal_states import NormalStates
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.fusion.tensors import ReadsParameters
from mergekit_ot.transport.measure import NeuronMeasure, Signs
from mergekit_ot.transport.problem import Barycenter, BarycenterProblem
from mergekit_ot.transport.solver import AbstractBarycenterSolver, Scope

# Samples whose activations tell the rotation of a stream; each has many positions.
_SAMPLES = 500


def rotated_streams(alignment: Alignment, normal: NormalStates | None) -> Iterator[str]:
    """Yields the groups that may be rotated and on which norms stand: residual streams.

    Args:
        alignment: Tells what may be rotated.
        normal: How states were rewritten; None where they were not, and no stream may be rotated.
    """
    normed = {} if normal is None else normal.form.neutral
    yield from (key for key in alignment.rotations if key in normed)


def is_anchored(key: str, alignment: Alignment, tensors: ReadsParameters) -> bool:
    """Whether what stands beside nothing else that moves has as many numbers per neuron as there are neurons.

    Args:
        key: The stream.
        alignment: Without any coupling.
        tensors: Gives the sources' parameters.
    """
    view = GroupView(key, alignment, Scope.INCIDENT, tensors.read)
    signs = view.signs()
    return signs is not None and int(signs.columns.sum()) >= alignment.target.groups[key].size


class StreamResponses:
    """Barycenters of streams by their activations on calibration data.

    Args:
        setup: The fusion; its data may be none.
    """

    def __init__(self, setup: FusionSetup) -> None:
        self.setup = setup

    def barycenters(
        self, keys: Sequence[str], alignment: Alignment, solver: AbstractBarycenterSolver, seed: int
    ) -> dict[str, Barycenter]:
        """Returns barycenters of streams, of those for which there are activations.

        Args:
            keys: The streams.
            alignment: Tells which symmetry they have.
            solver: Finds the couplings.
            seed: Seed of every random choice.
        """
        setup, found = self.setup, {}
        models = setup.models
        if not keys or setup.data is None or not isinstance(setup.inputs[0], torch.Tensor):
            return found
        size = min(_SAMPLES, setup.options.calibration_size)
        batches = list(calibration_batches(setup.data, size, len(setup.inputs[0]), setup.inputs))
        states = [dict(source.state) for source in models.sources]
        grams = ResponseGrams(models.graphs, states, list(keys), len(batches))
        for inputs in batches:
            grams.add(inputs)
        for key in keys:
            rows = grams.rows(key)
            if rows is not None:
                columns, none = torch.ones(rows[0].shape[1], dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
                signs = Signs(columns, none, none, alignment.rotations[key])
                measures = tuple(NeuronMeasure.uniform(each, signs=signs) for each in rows)
                size = alignment.target.groups[key].size
                problem = BarycenterProblem(measures, setup.model_weights, size, seed=seed, group=key)
                found[key] = solver.solve(problem)
        return found
