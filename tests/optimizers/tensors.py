"""A few tensors of all the kinds that optimizers tell apart, and steps on them without a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finetrainers.optimizers.build import build_optimizer
from tests.training.tiny_run import optimizer_options

SHAPES = [(64, 64), (128, 300), (70,), (5000,), (16, 4, 3, 3), (4096,), (1, 8, 33), (256, 512)]
"""Matrices and others; smaller and larger than what is quantised, whole blocks and not."""


def make_tensors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = {f"layer.{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(SHAPES)}
    return {name: nn.Parameter(tensor.to(device, dtype)) for name, tensor in drawn.items()}


def make_optimizer(name: str, tensors: dict[str, nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    return build_optimizer(tensors, optimizer_options(name, **({"weight_decay": 0.01} | options)), seed=3)


def take_steps(optimizer: torch.optim.Optimizer, tensors: dict[str, nn.Parameter], steps: Iterable[int]) -> None:
    """Steps with gradients that depend on the step's number alone, from a loss, so that hooks run. The second tensor
    has none in odd steps, as those of an expert that was not asked."""
    for step in steps:
        generator = torch.Generator().manual_seed(step + 10)
        loss = torch.zeros((), device=next(iter(tensors.values())).device)
        for number, tensor in enumerate(tensors.values()):
            factor = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            if number != 1 or step % 2 == 0:
                loss = loss + (tensor.float() * factor).sum() / 100
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def values_of(tensors: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    return [name for name in one if not torch.equal(one[name], other[name])]
