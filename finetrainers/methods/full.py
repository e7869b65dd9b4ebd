"""Full fine-tuning: every weight of the transformer moves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers.errors import UserError
from finetrainers.methods.base import Method
from finetrainers.weights import write_transformer


class Full(Method):
    """All weights in fp32, so that small updates are not lost, and bf16 arithmetic under autocast; or in bf16, and
    rounded at random, so that they are not lost in the mean."""

    name = "full"
    saves_trained_only = False

    @property
    def weights_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.options.weights_dtype]

    @property
    def trained_dtype(self) -> torch.dtype:
        return self.weights_dtype

    def attach(self, models: Mapping[str, nn.Module], seed: int) -> None:
        for name, model in models.items():
            model.requires_grad_(True)
            if self.float8_recipe is not None:
                self._compute_in_float8(name, model, self.float8_recipe)

    @property
    def float8_recipe(self) -> str | None:
        recipe: str | None = self.options.float8_recipe
        return recipe

    def _compute_in_float8(self, name: str, model: nn.Module, recipe: str) -> None:
        # torchao is optional.
        from finetrainers.float8 import choose_layers, compute_in_float8

        family = self.family
        leave = (family.precise_layers, family.sensitive_layers)
        layers = choose_layers(model, family.blocks(name, model), leave=leave)
        if not layers:
            raise UserError(
                f"method.float8_recipe {recipe}: no linear layer of the blocks of {name} has sizes that are multiples "
                "of 16: leave it out"
            )
        compute_in_float8(model, layers, recipe, emulate=not torch.cuda.is_available())

    @property
    def linear_dtype(self) -> torch.dtype | None:
        return None if self.dtype == self.weights_dtype else self.dtype

    @property
    def saved_dtype(self) -> torch.dtype | None:
        return self.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        # Each weight is used once a pass: kept, their copies would only lie there, and outlive weights that are shared.
        enabled = self.dtype != self.weights_dtype
        return torch.autocast(device.type, dtype=self.dtype, enabled=enabled, cache_enabled=False)

    def save(self, models: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
        for part, tensors in weights.items():
            write_transformer(folder / part, tensors, models[part], notes=self.family.notes())
