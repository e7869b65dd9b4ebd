"""What is done when a step exhausts the memory: the run ends and says what to change, or changes it and goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetrainers.errors import RunError
from finetrainers.memory.exhausted import explain
from finetrainers.training.measures import save_activations

if TYPE_CHECKING:
    from finetrainers.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass
class Rescue:
    """How activations are kept now, and what may still be done about them; no number of a run is changed by it."""

    checkpointing: str = "full"
    """`training.gradient_checkpointing`."""
    offload: bool = False
    """`memory.offload_activations`."""
    adapts: bool = False
    """Whether a measure is taken and the step repeated, rather than the run ended."""
    advice: Sequence[str] = field(default=("data.buckets of fewer frames or smaller pictures",))
    """What a user can change, the cheapest first."""

    def take(self, trainer: Trainer, error: RuntimeError) -> None:
        """Take the next measure, and drop what the failed passes left, so that they can be repeated.

        Raises RunError where nothing is to be done, saying what held the memory.
        """
        step = trainer.state.step + 1
        reason = explain(error, f"step {step}", trainer.device, trainer.held(), self.advice)
        measure = self._next() if self.adapts else None
        if measure is None:
            raise RunError(reason) from error
        self.checkpointing, self.offload = measure
        for parameter in trainer.trained.values():
            parameter.grad = None
        save_activations(trainer.method, trainer.models, checkpointing=self.checkpointing, offload=self.offload)
        taken = f"training.gradient_checkpointing={self.checkpointing} memory.offload_activations={self.offload}"
        logger.warning("%s. Step %d is repeated with %s: start with it next time", reason, step, taken)

    def _next(self) -> tuple[str, bool] | None:
        if self.checkpointing == "none":
            return "every-2", self.offload
        if self.checkpointing != "full":
            return "full", self.offload
        return None if self.offload else ("full", True)
