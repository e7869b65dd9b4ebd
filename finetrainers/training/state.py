"""Where a run stands: the step, what it has seen, and what a step gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class TrainState:
    """Counts that a checkpoint keeps. Everything drawn is a function of the seed and of these."""

    step: int = 0
    """Optimizer steps done."""
    batches: int = 0
    """Batches consumed, over all epochs; the position in the order of the data."""
    samples: int = 0
    """Samples seen."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave. `loss` and `grad_norm` stay on the device until somebody must know them."""

    step: int
    epoch: int
    loss: Tensor
    """Mean over every sample of the step, fp32 scalar."""
    grad_norm: Tensor
    """Global norm before clipping, fp32 scalar."""
    lr: float
    step_time: float
    """Seconds of the step, waiting for data included; validations and checkpoints are not in it."""
    data_time: float
    """Seconds of it spent waiting for batches."""
    num_samples: int
    num_tokens: int
