"""Reports the memory of the phases that lie inside training: before it, its first step, validations, its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetrainers.memory.report import Held, MemoryReport, held
from finetrainers.training.callback import Callback

if TYPE_CHECKING:
    from finetrainers.training.state import StepOutcome
    from finetrainers.training.trainer import Trainer


class MemoryPhases(Callback):
    """Put it after `MetricsFile`: each phase begins a new peak, which would otherwise hide the step's own."""

    def __init__(self, report: MemoryReport) -> None:
        self._report = report
        self._stepped = False

    def on_start(self, trainer: Trainer) -> None:
        self._report.phase("before training", _held(trainer))

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if not self._stepped:
            self._stepped = True
            self._report.phase("after the first step", _held(trainer))

    def on_validation(self, trainer: Trainer, metrics: dict[str, float], videos: dict[str, Path]) -> None:
        self._report.phase("validation", _held(trainer))

    def on_end(self, trainer: Trainer) -> None:
        self._report.phase("end", _held(trainer))


def _held(trainer: Trainer) -> Held:
    return held(trainer.models.values(), trainer.optimizer, trainer.device)
