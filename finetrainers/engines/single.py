"""One process on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetrainers.engines.base import Engine
from finetrainers.optimizers.by_tensor import InBackward


class SingleEngine(Engine):
    """The step as torch gives it, and nobody to share with."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        if not isinstance(self._optimizer, InBackward):
            return super().step()
        # The backward pass has applied and dropped the gradients.
        self._optimizer.step()
        return torch.linalg.vector_norm(torch.stack(self._optimizer.take_norms()))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def claim(self, count: int) -> Iterator[int]:
        return iter(range(count))
