"""Full fine-tuning: every weight of the transformer moves."""

from __future__ import annotations

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

    def attach(self, transformer: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        transformer.requires_grad_(True)
        return dict(transformer.named_parameters())

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def save(self, transformer: nn.Module, folder: Path) -> None:
        write_transformer(folder, transformer.state_dict(), transformer, self.dtype)
