"""The contract of an engine: how a run is spread over processes. Training and encoding see only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from finetrainers.types import Batch

Loss = Callable[[Batch], Tensor]
"""A batch to the loss of each of its samples."""


class Engine(ABC):
    """One way of running a step on one or many processes. All of them run the same program; `rank` 0 is the main one,
    which alone writes and speaks."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def generator(self) -> torch.Generator:
        """The device's own generator, from which modules draw, such as dropout. Seeding it costs microseconds, where
        `torch.manual_seed` looks for every kind of device."""
        if self.device.type == "cuda":
            torch.cuda.init()
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator

    # A step.

    def prepare(self, models: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """Bring the models to the device, ready for forward passes."""
        return {name: model.to(self.device) for name, model in models.items()}

    @abstractmethod
    def spread(self, loss: Loss, models: Mapping[str, torch.nn.Module]) -> Loss:
        """The loss as it is to be called in a step, so that its gradients become those of all processes."""

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one forward and backward pass. Only after the last one of a step are the gradients those of
        all processes together."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the step's loss."""

    def clip_grad_norm(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients down to a global norm (0: leave them) and return the norm before, fp32, on the device."""
        # As torch.nn.utils.clip_grad_norm_ does it, less its sorting by device and type, which takes as long again.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if max_norm > 0:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the gradients, then drop them."""
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    # Between processes.

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of ranks, on every process."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Cheap enough for each step."""

    @abstractmethod
    def claim(self, count: int) -> Iterator[int]:
        """Numbers below `count`, each for one process alone, handed out as processes become free: one that works on a
        long item leaves the others to the rest. Each call is a round of its own, which every process calls."""

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What stands in the block is done by the main process, and by the others once it is through, say to find what
        it wrote."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def close(self) -> None:  # noqa: B027 - where there are others
        """Leave the other processes."""
