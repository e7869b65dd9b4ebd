"""Weights in low precision on disk, so that the next run need not make them again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetrainers.folder import written_whole
from finetrainers.memory.quantized import Codes, quantized_shapes

logger = logging.getLogger(__name__)


def read_kept(file: Path, model: nn.Module, formats: Mapping[str, str]) -> dict[str, Codes] | None:
    """Codes and scales of these linear layers, mapped from the file; None if it is not there, or does not hold just
    them, which is said."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged and will be written again: %s", file, error)
        return None
    if {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()} != _expected(model, formats):
        logger.warning("%s holds other layers and will be written again", file)
        return None
    logger.info("weights in low precision are read from %s", file)
    return {name: (tensors[f"{name}.weight"], tensors[f"{name}.scale"]) for name in formats}


def write_kept(file: Path, held: Mapping[str, Codes]) -> None:
    """Write them for `read_kept`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, (codes, scale) in held.items():
        tensors |= {f"{name}.weight": codes.contiguous(), f"{name}.scale": scale.contiguous()}
    with written_whole(file) as temporary:
        save_file(tensors, temporary)


def _expected(model: nn.Module, formats: Mapping[str, str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor."""
    expected = {}
    for name, format in formats.items():
        linear: Any = model.get_submodule(name)
        codes, scale = quantized_shapes(format, linear.out_features, linear.in_features)
        expected[f"{name}.weight"] = torch.Size(codes), torch.int8
        expected[f"{name}.scale"] = torch.Size(scale), torch.bfloat16
    return expected
