"""Linear layers that compute in float8, through torchao, which is optional: only what asks for them imports this."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear

from finetrainers.memory.quantized import plain_linear_layers

_MULTIPLE = 16
"""Both sizes of a weight, and the number of tokens, must be multiples of it: each is once what is summed over."""


class Float8Linear(TorchaoLinear):
    """torchao's layer, whose weight keeps its type and its name. Forward pass and both products of the backward pass
    take float8 numbers, scaled by the largest of each tensor or row as it is at that time, and answer in the type that
    a linear layer would.

    Unlike torchao's it takes any number of tokens, and heeds autocast on a CPU too.
    """

    def forward(self, input: Tensor) -> Tensor:
        kind, rows = "cuda" if input.is_cuda else "cpu", input.flatten(0, -2)
        if torch.is_autocast_enabled(kind):
            rows = rows.to(torch.get_autocast_dtype(kind))
        # Rows of zeros move no scale, and add nothing to the weight's gradient.
        if added := -len(rows) % _MULTIPLE:
            rows = nn.functional.pad(rows, (0, 0, 0, added))
        answer: Tensor = super().forward(rows)
        return answer[: len(rows) - added].unflatten(0, input.shape[:-1])


def choose_layers(model: nn.Module, blocks: Iterable[nn.Module], *, leave: Collection[str]) -> list[str]:
    """Paths of the linear layers within the blocks whose sizes suit float8, without those in whose path any of the
    regular expressions `leave` is found."""
    return [
        name
        for name, module in plain_linear_layers(model, blocks).items()
        if not module.in_features % _MULTIPLE
        and not module.out_features % _MULTIPLE
        and not any(re.search(pattern, name) for pattern in leave)
    ]


def compute_in_float8(model: nn.Module, names: Collection[str], recipe: str, *, emulate: bool) -> None:
    """Put a Float8Linear with the same parameters in the place of each of these layers. `recipe` is the name of one of
    torchao's; `emulate` computes the same products of fp32 copies, where there are none of float8."""
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    # Its own entry, which also prepares the compiler for float8.
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    for name in names:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, Float8Linear.from_float(layer, config=config).train(layer.training))


def describe(blocks: Iterable[nn.Module], recipe: str) -> str:
    """What of blocks computes in float8, in a line."""
    layers = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    chosen = [layer for layer in layers if isinstance(layer, Float8Linear)]
    how = ", emulated, which takes longer" if any(layer.config.emulate for layer in chosen) else ""
    return (
        f"of {len(layers)} linear layers of the blocks {len(chosen)} compute in float8 ({recipe}{how}), "
        f"{len(layers) - len(chosen)} in bf16"
    )
