"""Writes the weights that a user takes away, at each checkpoint's step and at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetrainers.training.callback import Callback
from finetrainers.training.state import StepOutcome
from finetrainers.training.trainer import Trainer
from finetrainers.weights import WeightsFolder


class WeightsSaver(Callback):
    """Comes before the checkpointer, so that a checkpoint's weights are always there when it is."""

    def __init__(self, folder: WeightsFolder, *, every: int, write_card: Callable[[Path, int], None]) -> None:
        self.folder = folder
        self.every = every
        self.write_card = write_card
        self._saved_step = -1

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if self.every and outcome.step % self.every == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        # An interrupted run has little time: its checkpoint is enough to go on.
        if not trainer.stopping and trainer.state.step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Every process holds all weights, so that one of them writes."""
        step = trainer.state.step
        temporary = self.folder.begin(step)
        trainer.method.save(trainer.models, temporary)
        self.write_card(temporary, step)
        self.folder.finish(temporary, step)
        self._saved_step = step
