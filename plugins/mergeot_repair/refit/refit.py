"""Refits the linear maps of a fused model to what the aligned sources compute: no labels, no gradients, one pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mergekit_ot import AbstractRepair, Aim, DataError, RepairContext
from mergeot_repair.control import SHIFTED, check_control, check_statistics
from mergeot_repair.programs.maps import free_maps
from mergeot_repair.refit.candidates import SINGLE, Candidates, Nearness, parted, sources_to_try
from mergeot_repair.refit.disagreeing import saw_different_things
from mergeot_repair.refit.one_pass import RefitPass
from mergeot_repair.refit.pieces import in_pieces
from mergeot_repair.refit.recurrent_results import token_maps
from mergeot_repair.refit.results import AUTO, OUTPUTS, result_maps
from mergeot_repair.streams.finding import StreamFinder

# The control fits what a network makes to itself: a share of the samples shows whether that changes it.
_CONTROL_SHARE = 10


@dataclass(frozen=True)
class RefitRepair(AbstractRepair):
    """Fits each linear map, in order, to what the sources compute there.

    Neurons that are made and read by linear maps and recurrent cells alone are taken from the sources, chosen by
    what their readers need (see `mergeot_repair.refit.selection`); all others follow the couplings and are fitted to
    the mean of the aligned sources. The results of the model are always fitted to the mean of the sources' results.

    A residual stream that linear maps read behind norms alone, as in transformers, becomes the principal components of
    the sources' streams; the heads and neurons between are chosen among the sources' (see `mergeot_repair.streams`).

    The inputs of a regression are the fused model's own, so a map also makes up for what the maps before it lack. It is
    pulled towards the weights that the sources have there, by as much as suits samples that were held out. A BatchNorm
    behind a map is fitted together with it. Where the result is added to a stream, the map is fitted to the stream that
    the sources have in the mean, less what the fused model adds it to.

    Recurrent layers are fitted gate by gate on their input and on hidden states of the sources, never on own ones.
    Weights that stand in several places, transposed convolutions with groups and projected LSTMs stay as they are.

    Attributes:
        target: What the results of a classifier are fitted to. ``outputs``: the mean outputs of the sources.
            ``log-probabilities``: the logarithm of the mean of their probabilities, in closed form.
            ``probabilities``: the mean of their probabilities, with the least Kullback-Leibler divergence. ``auto``:
            outputs, but probabilities for tokens that states of recurrent layers predict, and whichever of the three
            gives the answers of the mean probabilities most often where sources are sure of different classes.
        neurons: Whose neurons the network has. ``mixed``: those of all sources, chosen as above. ``single``: those of
            the source nearest to the ensemble, with results fitted to it. ``auto``: what is nearer on held-back inputs.
    """

    target: Literal["auto", "outputs", "log-probabilities", "probabilities"] = AUTO
    neurons: Literal["auto", "mixed", "single"] = AUTO

    needs_data: ClassVar[bool] = True

    def aim(self, context: RepairContext) -> Aim:
        """Returns what the results are brought near to; raises DataError where that is classes and there are none."""
        if self.target == OUTPUTS:
            return Aim.OUTPUTS
        maps = free_maps(context)
        of_classes = result_maps(context.program, maps, context.joined)
        if self.target == AUTO:
            makers = [linear_map for linear_map in maps if linear_map.node in of_classes]
            is_of_tokens = bool(token_maps(context, maps))
            return Aim.PROBABILITIES if is_of_tokens or saw_different_things(context, makers) else Aim.OUTPUTS
        if not of_classes:
            raise DataError(
                f"Option target={self.target} of repair 'refit' is about classes, and no linear map makes the results "
                "of this network, one number per class. Take target=outputs."
            )
        return Aim.PROBABILITIES

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with new linear maps.

        Raises:
            DataError: The procedure changes an untouched source, which is its control; or no one source can be taken.
        """
        with in_pieces():
            check_statistics(context, "refit", least_shift=SHIFTED)
            streams = StreamFinder(context, free_maps(context)).find()
            check_control(context, "refit", lambda control: RefitPass(control, streams, _CONTROL_SHARE).run())
            fit = functools.partial(RefitPass, target=self.target)
            refit = fit(context, streams)
            # A stream that is rebuilt is made of both sources, and takes what both have.
            alone = sources_to_try(context, self.neurons, bool(refit.selection.groups) and not streams)
            fitted, held_back = parted(context)
            if not alone or not (held_back or self.neurons == SINGLE):
                return refit.run()
            candidates = Candidates(fitted, Nearness(context, held_back or fitted.batches))
            if self.neurons != SINGLE:
                candidates.add_mixed(lambda own: fit(own).run())
            candidates.add_nearest_of(alone, lambda own: fit(own).fit_results(), bool(refit.tokens))
            return candidates.nearest()
