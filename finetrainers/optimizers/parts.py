"""torchao's quantised states as the plain tensors that they consist of, which can be kept on the host and on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CODES, _SCALE, _QMAP = "codes", "scale", "qmap"
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
_PARTS = (_CODES, _SCALE, _QMAP)


def take_apart(state: dict[str, Any]) -> dict[str, Any]:
    """A state in which each quantised tensor is three plain ones, such as `exp_avg.codes`."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if hasattr(value, _CODES):
            plain |= {f"{name}.{part}": getattr(value, part) for part in _PARTS}
        else:
            plain[name] = value
    return plain


def put_together(state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """What `take_apart` took apart, for a parameter of a shape."""
    whole = {name: value for name, value in state.items() if "." not in name}
    for name, signed in _SIGNED.items():
        if f"{name}.{_CODES}" in state:
            codes, scale, qmap = (state[f"{name}.{part}"] for part in _PARTS)
            whole[name] = _quantized(codes, scale, qmap, signed, shape)
    return whole


def _quantized(codes: Tensor, scale: Tensor, qmap: Tensor, signed: bool, shape: torch.Size) -> Tensor:
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    if qmap.numel() == 1 << 8:
        return OptimState8bit(codes, scale, qmap, signed, torch.float32)
    return OptimState4bit(codes, scale, qmap, signed, shape, torch.float32)
