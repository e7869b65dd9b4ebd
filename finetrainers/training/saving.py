"""Writes the weights that a user takes away, at each checkpoint's step and at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from finetrainers.engines.base import Engine
from finetrainers.methods.base import Method
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
        step = trainer.state.step
        weights = gather_weights(trainer.engine, trainer.method, trainer.models)
        if trainer.engine.is_main:
            temporary = self.folder.begin(step)
            trainer.method.save(trainer.models, weights, temporary)
            self.write_card(temporary, step)
            self.folder.finish(temporary, step)
        self._saved_step = step


def gather_weights(engine: Engine, method: Method, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Of each model that is trained what a user takes away, whole, on the main process; empty on the others."""
    return {
        part: engine.weights(models[part], trained_only=method.saves_trained_only, dtype=method.saved_dtype)
        for part in dict.fromkeys(name.partition(".")[0] for name in method.trained(models))
    }
