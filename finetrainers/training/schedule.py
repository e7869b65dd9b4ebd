"""The course of the learning rate."""

from __future__ import annotations

import torch


def build_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over `steps` optimizer steps, by diffusers' names."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max(steps, 1))
