"""Trains a fused model towards the ensemble of its sources: gradient steps, no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from mergekit_ot import AbstractRepair, Aim, RepairContext
from mergeot_repair.control import SHIFTED, check_statistics
from mergeot_repair.distil.ensemble import Ensemble, makes_classes, placed
from mergeot_repair.distil.training import Schedule, divergence, train
from mergeot_repair.refit.refit import RefitRepair

# Of the calibration inputs one in so many is held back, so many at most.
_HELD_BACK_SHARE, _MOST_HELD_BACK = 10, 1_000
# The start is fitted to so many at most: more hardly help it, and take long.
_MOST_FOR_START = 2_000
# A network that is so near to the ensemble computes it.
_NOTHING_LEFT = 1e-9

_State = Mapping[str, Tensor]


@dataclass(frozen=True)
class DistilRepair(AbstractRepair):
    """Trains the fused model on the mean predictions of its sources: knowledge distillation (arXiv:1503.02531).

    This is training, not one-shot: minutes to hours. It needs more inputs than other repairs, and no labels. Where
    results are classes, the Kullback-Leibler divergence from the mean of the sources' probabilities is made small;
    where they are numbers, the squared error. Inputs that are held back decide which state of the run is the result,
    and end it where nothing gains; what they do not find nearer to the ensemble than the start is never the result.

    BatchNorm keeps the statistics of the start, so that what is trained is the function that is written: its gains and
    shifts are trained, and it computes the same for any number of inputs. No buffer changes.

    Attributes:
        start: What is trained: ``refit``, the fused model after that repair, or ``fused``, the fused model as it is.
        target: ``probabilities`` of classes, ``outputs``, or ``auto``: probabilities for predictions of tokens, and
            where the sources' answers are sure.
        epochs: How often each input is seen, where nothing ends the training before.
        minutes: After which training ends, the learning rate falling in time; 0 sets no limit. With a limit, how far a
            run gets depends on the machine.
        learning_rate: Of Adam, at its highest.
        batch_size: Inputs per gradient step; 0 takes the size of a calibration batch, 100 at most.
    """

    start: Literal["refit", "fused"] = "refit"
    target: Literal["auto", "outputs", "probabilities"] = "auto"
    epochs: Annotated[int, Ge(1)] = 20
    minutes: Annotated[float, Ge(0)] = 0.0
    learning_rate: Annotated[float, Gt(0)] = 0.001
    batch_size: Annotated[int, Ge(0)] = 0

    needs_data: ClassVar[bool] = True

    def aim(self, context: RepairContext) -> Aim:
        """Returns what the results are brought near to."""
        is_of_classes = makes_classes(context) if self.target == "auto" else self.target == "probabilities"
        return Aim.PROBABILITIES if is_of_classes else Aim.OUTPUTS

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state after training.

        Raises:
            DataError: The calibration data do not look like the sources' own, or there is nothing to train towards.
        """
        return _Distil(self, context).run()


class _Distil:
    """One training.

    Args:
        options: Of the repair.
        context: Of the repair.
    """

    def __init__(self, options: DistilRepair, context: RepairContext) -> None:
        self.options, self.context = options, context
        batches = list(context.batches)
        self.ensemble = Ensemble(context, batches, context.aim is Aim.PROBABILITIES, context.device)
        generator = torch.Generator().manual_seed(context.seed)
        numbers = torch.randperm(len(self.ensemble), generator=generator)
        size = self.ensemble.size
        held = max(1, min(len(numbers) // _HELD_BACK_SHARE, _MOST_HELD_BACK) // size) * size
        self.held, self.numbers = numbers[:held], numbers[held:]

    def run(self) -> dict[str, Tensor]:
        """Trains, and returns the state that is nearest to the ensemble."""
        with torch.random.fork_rng():
            torch.manual_seed(self.context.seed)
            start, before = self._start()
            if before <= _NOTHING_LEFT:
                return dict(start)
            model = self._trainable(start)
            size = self.options.batch_size or self.ensemble.size
            schedule = Schedule(
                self.options.epochs,
                self.options.minutes,
                self.options.learning_rate,
                min(size, len(self.numbers)),
                self.context.seed,
            )
            with torch.enable_grad():
                best = train(model, self.ensemble, (self.numbers, self.held), schedule, self._tell)
            found = {
                name: best[name].to("cpu", value.dtype) if name in best else value for name, value in start.items()
            }
            after = self._distance(found)
        self._note(before, after)
        return found if after < before else dict(start)

    def _start(self) -> tuple[_State, float]:
        """Returns the state to be trained, and how far it is from the ensemble on the inputs that are held back."""
        context = self.context
        fused = context.fused, self._distance(context.fused)
        if fused[1] <= _NOTHING_LEFT:
            return fused
        if self.options.start == "fused":
            check_statistics(context, "distil", least_shift=SHIFTED)
            return fused
        parts = self.numbers[:_MOST_FOR_START].split(self.ensemble.size)
        batches = [self.ensemble.batch(part) for part in parts if len(part) == self.ensemble.size]
        repair, context = RefitRepair(), replace(context, batches=batches)
        state = repair.repair(replace(context, aim=repair.aim(context)))
        refitted = state, self._distance(state)
        return refitted if refitted[1] < fused[1] else fused

    def _distance(self, state: _State) -> float:
        model = placed(self.context.instance(state), self.context.device)
        return divergence(model, self.ensemble, self.held)

    def _trainable(self, state: _State) -> nn.Module:
        """Returns a network of which all is trained but what the user keeps, and what its architecture freezes."""
        model = placed(self.context.instance(state), self.context.device)
        if not any(value.requires_grad for value in model.parameters()):
            model.requires_grad_(True)
        for name, value in model.named_parameters(remove_duplicate=False):
            if name in self.context.kept:
                value.requires_grad_(False)
        return model

    def _tell(self, share: float, found: float, seconds: float) -> None:
        if self.context.progress is not None:
            left = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
            text = f"training: {found:.3g} from the ensemble, at most {left} left"
            self.context.progress(min(100, round(100 * share)), 100, text)

    def _note(self, before: float, after: float) -> None:
        if self.context.note is None:
            return
        unit = "" if self.ensemble.axis is None else " nats"
        self.context.note(
            f"Trained on {len(self.numbers):,} inputs without labels, which is not one-shot: on {len(self.held):,} "
            f"held back, {before:.3g}{unit} from the ensemble before and {after:.3g} after."
        )
