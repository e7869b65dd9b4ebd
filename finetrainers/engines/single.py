"""One process on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetrainers.engines.base import Engine


class SingleEngine(Engine):
    """The step as torch gives it, and nobody to share with."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def claim(self, count: int) -> Iterator[int]:
        return iter(range(count))
