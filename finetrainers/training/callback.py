"""The moments of a run at which other things happen; each callback is one behaviour, each moment a no-op by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from finetrainers.training.state import StepOutcome
    from finetrainers.training.trainer import Trainer


class Callback:
    """Override the moments that matter. Callbacks are called in the order in which the trainer was given them."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a checkpoint was loaded if there is one."""

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """After each optimizer step."""

    def on_validation(self, trainer: Trainer, metrics: dict[str, float], videos: dict[str, Path]) -> None:
        """After a validation: its numbers, and its videos by prompt."""

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Just before a checkpoint is written; what is pending must be on disk after this."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or after the step at which the run was asked to stop."""

    def close(self) -> None:
        """Always, even when the run failed: give back what is held."""
