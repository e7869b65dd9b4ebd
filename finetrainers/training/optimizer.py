"""Optimizers and schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from finetrainers.errors import UserError


def check_optimizer(name: str, *, shared: bool) -> None:
    """Refuse, before anything slow, an optimizer whose package is not installed, and one whose state cannot be `shared`
    by processes."""
    if name == "adamw_8bit" and shared:
        raise UserError(
            "optimizer.name adamw_8bit keeps its state whole on each process: take adamw, whose state fsdp and "
            "deepspeed share, or parallel.strategy ddp"
        )
    if name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise UserError("optimizer.name adamw_8bit needs bitsandbytes: pip install 'finetrainers[bitsandbytes]'")


def build_optimizer(
    name: str,
    parameters: Sequence[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer over the parameters that move."""
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    # Fused: one kernel for all parameters, three times less time per step than the foreach version.
    return torch.optim.AdamW(parameters, fused=True, **settings)


def build_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over `steps` optimizer steps, by diffusers' names."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max(steps, 1))
