"""A stack of blocks of two layouts, with adapters beside frozen weights of several types, as streamed models are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 72
"""Enough for the codes of a layer to be a large buffer."""


class Quantized(nn.Module):
    """A linear layer that holds codes and a scale instead of its weight, as parameters or as buffers."""

    def __init__(self, width: int, dtype: torch.dtype, *, as_buffers: bool) -> None:
        super().__init__()
        codes = torch.randn(width, width)
        codes = (codes * 20 + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else codes.to(dtype)
        scale = torch.rand(width, 1) / 50 if dtype == torch.uint8 else torch.rand(())
        if as_buffers:
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale)
        else:
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)
        self.centre = 128 if dtype == torch.uint8 else 0

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.codes.float() - self.centre) * self.scale)


class Block(nn.Module):
    """Its own table is used by itself, as diffusers' blocks do; `wide` ones hold more."""

    def __init__(self, number: int, width: int, *, adapted: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width * (3 if number % 2 else 1))
        self.outer = nn.Linear(self.inner.out_features, width, bias=False)
        self.register_buffer("positions", torch.arange(width).float())
        self.quantized = self.adapter = None
        if adapted:
            self.requires_grad_(False)
            dtype = (torch.uint8, torch.float8_e4m3fn)[number % 2]
            self.quantized = Quantized(width, dtype, as_buffers=number % 3 == 0)
            self.adapter = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(torch.tanh(self.inner(self.norm(x) * (1 + self.table)) + self.positions[0]))
        if self.quantized is not None:
            y = y + torch.tanh(self.quantized(x))
            y = y + self.adapter(x)
        return x + y / 8


class Stack(nn.Module):
    """Blocks that are checkpointed one by one."""

    def __init__(self, num_blocks: int, *, adapted: bool, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width).requires_grad_(not adapted)
        self.blocks = nn.ModuleList([Block(number, width, adapted=adapted) for number in range(num_blocks)])
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block.__call__, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def make_stack(num_blocks: int = 6, *, adapted: bool, **settings: Any) -> Stack:
    """The same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Stack(num_blocks, adapted=adapted, **settings)
