"""One process on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetrainers.engines.base import Engine


class SingleEngine(Engine):
    """The step as torch gives it."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prepare(self, models: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        return {name: model.to(self.device) for name, model in models.items()}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
        # As torch.nn.utils.clip_grad_norm_ does it, less its sorting by device and type, which takes as long again.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if max_norm > 0:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
