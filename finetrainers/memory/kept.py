"""Codes and scales of quantized layers on disk, so that a later run need not make them again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetrainers.folder import written_whole

logger = logging.getLogger(__name__)

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of codes and of scales."""


def read_kept(file: Path, shapes: Mapping[str, Shapes]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Codes and scales by the layer's path, mapped from the file; None if it is not there, or does not hold just these
    layers, which is said."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged and will be written again: %s", file, error)
        return None
    expected = {
        f"{name}.{part}": (shape, dtype)
        for name, pair in shapes.items()
        for part, shape, dtype in zip(("weight", "scale"), pair, (torch.int8, torch.bfloat16), strict=True)
    }
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != expected:
        logger.warning("%s holds other layers and will be written again", file)
        return None
    return {name: (tensors[f"{name}.weight"], tensors[f"{name}.scale"]) for name in shapes}


def write_kept(file: Path, held: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write them for `read_kept`, whole or not at all."""
    tensors = {}
    for name, (codes, scale) in held.items():
        tensors |= {f"{name}.weight": codes.contiguous(), f"{name}.scale": scale.contiguous()}
    with written_whole(file) as temporary:
        save_file(tensors, temporary)
