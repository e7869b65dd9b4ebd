"""The contract of an engine: how a step is spread over processes. The trainer sees only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Engine(ABC):
    """One way of running a step."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def generator(self) -> torch.Generator:
        """The device's own generator, from which modules draw, such as dropout. Seeding it costs microseconds, where
        `torch.manual_seed` looks for every kind of device."""
        if self.device.type == "cuda":
            torch.cuda.init()
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator

    @abstractmethod
    def prepare(self, models: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """Bring the models to the device, ready for forward passes."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the step's loss."""

    @abstractmethod
    def clip_grad_norm(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients down to a global norm (0: leave them) and return the norm before, fp32, on the device."""

    @abstractmethod
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the gradients, then drop them."""
