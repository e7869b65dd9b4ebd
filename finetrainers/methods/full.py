"""Full fine-tuning: every weight of the transformer moves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetrainers.methods.base import Method
from finetrainers.weights import write_transformer


class Full(Method):
    """All weights in fp32, so that small updates are not lost; bf16 arithmetic under autocast."""

    name = "full"

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32

    def attach(self, models: Mapping[str, nn.Module], seed: int) -> dict[str, nn.Parameter]:
        trained: dict[str, nn.Parameter] = {}
        for part, model in models.items():
            model.requires_grad_(True)
            trained |= {f"{part}.{name}": parameter for name, parameter in model.named_parameters()}
        return trained

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def save(self, models: Mapping[str, nn.Module], folder: Path) -> None:
        for part, model in models.items():
            write_transformer(folder / part, model.state_dict(), model, self.dtype, notes=self.family.notes())
