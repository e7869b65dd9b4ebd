"""Frozen weights in low precision: linear layers that hold codes and scales, and compute in the type of their input."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetrainers.errors import UserError

VERSION = 1
"""Raised whenever the same weights would become other codes."""
_INT8_BLOCK, _NF4_BLOCK = 128, 64
"""Weights that share a scale: of int8 inputs of one output, of nf4 neighbours in memory."""
_SMALLEST = 1e-30
"""A scale is never 0, for blocks of zeros."""

Codes = tuple[Tensor, Tensor]
"""Codes (int8) and scales (bf16) of one weight."""


def check_format(option: str, format: str | None) -> None:
    """Raise UserError, before anything slow, where the package that a format needs is not installed."""
    if format == "nf4" and find_spec("bitsandbytes") is None:
        raise UserError(f"{option} nf4 needs bitsandbytes: pip install 'finetrainers[bitsandbytes]'")


def quantized_bytes(format: str, out_features: int, in_features: int) -> int:
    """Bytes of codes and scales of a linear layer's weight; its bias stays as it is."""
    codes, scale = quantized_shapes(format, out_features, in_features)
    return math.prod(codes) + math.prod(scale) * torch.bfloat16.itemsize


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is held in low precision and computed with in the type of the input.

    `weight` holds the codes of every format as int8, and `scale` bf16: libraries cast floating-point weights, and
    transformers casts the input of some layers to the type of their weight unless it is int8. Both are parameters that
    require no gradient, so that what moves, streams or counts frozen weights needs no case of its own.
    """

    def __init__(self, format: str, size: tuple[int, int], *, codes: Tensor, scale: Tensor, bias: Any) -> None:
        """`size` is out and in features."""
        super().__init__()
        self.format = format
        self.out_features, self.in_features = size
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        size = (self.out_features, self.in_features)
        answer: Tensor = _FrozenLinear.apply(input, self.weight, self.scale, self.bias, self.format, size)
        return answer

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight that it computes with."""
        return dequantize(self.weight, self.scale, self.format, (self.out_features, self.in_features), dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format}"


class _FrozenLinear(torch.autograd.Function):
    """Keeps for the backward pass the codes, which lie there anyway, and makes the weight of them again: autograd would
    keep the weight in the type that is computed in, of every layer at once."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, size: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.format, ctx.size = format, size
        return nn.functional.linear(input, dequantize(codes, scale, format, size, input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        weight = dequantize(codes, scale, ctx.format, ctx.size, gradient.dtype)
        return gradient @ weight, None, None, None, None, None


def choose_formats(
    model: nn.Module, blocks: Iterable[nn.Module], format: str, *, precise: str, sensitive: str
) -> dict[str, str]:
    """Paths of the linear layers within the blocks whose weights are frozen, each with the format that it is to be held
    in: int8, the most precise, where the regular expression `sensitive` is found in its path, and none at all where
    `precise` is. Layers that are special kinds of linear ones are left alone."""
    return {
        name: "int8" if re.search(sensitive, name) else format
        for name, module in plain_linear_layers(model, blocks).items()
        if not any(parameter.requires_grad for parameter in module.parameters()) and not re.search(precise, name)
    }


def plain_linear_layers(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Linear]:
    """The linear layers within the blocks by their paths in the model, without special kinds of linear ones."""
    within = {id(module) for block in blocks for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if id(module) in within and type(module) is nn.Linear
    }


def quantize_layers(
    model: nn.Module, formats: Mapping[str, str], *, device: torch.device, known: Mapping[str, Codes] | None = None
) -> dict[str, Codes]:
    """Put a QuantizedLinear in the place of each of these linear layers, one after the other. Codes are computed on
    the device, or taken from those that are known, and come to where the weight lay, which is let go. Returns them."""
    held = {}
    for name, format in formats.items():
        linear: Any = model.get_submodule(name)
        codes, scale = quantize(linear.weight.detach().to(device), format) if known is None else known[name]
        held[name] = codes.to(linear.weight.device), scale.to(linear.weight.device)
        size = (linear.out_features, linear.in_features)
        layer = QuantizedLinear(format, size, codes=held[name][0], scale=held[name][1], bias=linear.bias)
        model.set_submodule(name, layer.train(linear.training))
    return held


def describe(models: Iterable[nn.Module]) -> str:
    """What of models is held in low precision, in a line."""
    layers = [module for model in models for module in model.modules() if isinstance(module, QuantizedLinear)]
    size = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers)
    used = " and ".join(sorted({layer.format for layer in layers}))
    return f"the weights of {len(layers)} linear layers are held in {used}: {size / 2**30:.3g} GiB"


def quantize(weight: Tensor, format: str) -> Codes:
    """Codes (int8) and scales (bf16) of a weight [out, in], on its device."""
    (_, columns), scale_shape = quantized_shapes(format, *weight.shape)
    if format == "nf4":
        return _quantize_nf4(weight)
    block = columns // scale_shape[1]
    blocks = weight.float().unflatten(1, (-1, block))
    largest = blocks.abs().amax(2, keepdim=True).clamp_(min=_SMALLEST)
    if format == "fp8":
        # The power of two that brings the largest weight to 128 to 256, of the 448 that the format reaches: codes times
        # it are exact in bf16 too, and floating point is as precise at any scale.
        scale = largest.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32) * 2.0**-7
        codes = (blocks / scale).to(torch.float8_e4m3fn).view(torch.int8)
    else:
        # Rounded before it is used, so that the rounding is no error. Its half step of 1/512 rounds 127 to 127.25 at
        # most.
        scale = (largest / 127).bfloat16().float()
        codes = (blocks / scale).round_().to(torch.int8)
    return codes.flatten(1), scale.squeeze(2).bfloat16()


def dequantize(codes: Tensor, scale: Tensor, format: str, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that codes and scales stand for."""
    if format == "fp8":
        return codes.view(torch.float8_e4m3fn).to(dtype).mul_(scale.to(dtype))
    if format == "int8":
        blocks = codes.unflatten(1, (scale.shape[1], -1))
        return torch.mul(blocks, scale.to(dtype)[:, :, None]).flatten(1)
    return _dequantize_nf4(codes, scale, size, dtype)


def quantized_shapes(format: str, out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of codes and of scales."""
    if format == "fp8":
        return (out_features, in_features), (out_features, 1)
    if format == "int8":
        # The largest power of two up to a whole block that divides the inputs.
        return (out_features, in_features), (out_features, in_features // math.gcd(in_features, _INT8_BLOCK))
    num_blocks = -(-out_features * in_features // _NF4_BLOCK)
    return (num_blocks, _NF4_BLOCK // 2), (num_blocks,)


def _quantize_nf4(weight: Tensor) -> Codes:
    from bitsandbytes.functional import quantize_4bit

    flat = weight.flatten()
    # Rows of one block: of rows that end within a block, bitsandbytes 0.50 on a CPU makes other weights.
    blocks = nn.functional.pad(flat, (0, -flat.numel() % _NF4_BLOCK)).unflatten(0, (-1, _NF4_BLOCK))
    codes, state = quantize_4bit(blocks, blocksize=_NF4_BLOCK, quant_type="nf4")
    return codes.view(torch.int8).view(len(blocks), -1), state.absmax.bfloat16()


def _dequantize_nf4(codes: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    shape = torch.Size((len(codes), _NF4_BLOCK))
    state = QuantState(scale.float(), shape=shape, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=dtype)
    flat: Tensor = dequantize_4bit(codes.view(torch.uint8).view(-1, 1), state).flatten()
    return flat[: math.prod(size)].view(size)
