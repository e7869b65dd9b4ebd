"""Measures that save memory, put into the models to which a method is attached: weights in low precision, and
activations that are computed again or lie on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.hashing import digest
from finetrainers.memory import quantized
from finetrainers.memory.checkpointing import set_activations
from finetrainers.memory.offload import ActivationOffloader, HostMemory
from finetrainers.methods.base import Method
from finetrainers.training.kept import read_kept, write_kept


def lower_precision(
    method: Method,
    models: Mapping[str, nn.Module],
    format: str | None,
    *,
    device: torch.device,
    kept_in: Path | None = None,
) -> None:
    """Hold the frozen weights of the transformers' blocks in the format of `memory.base_weights`, made on `device` and
    left there; with a folder, kept there. None leaves them as they are."""
    for name, model in models.items():
        if format is not None and name.startswith("transformer"):
            family = method.family
            formats = quantized.choose_formats(
                model,
                family.blocks(name, model),
                format,
                precise=family.precise_layers,
                sensitive=family.sensitive_layers,
            )
            kept, known = None, None
            if kept_in is not None:
                made_by = [quantized.VERSION, str(method.weights_dtype), device.type]
                kept = kept_in / f"{digest([family.fingerprint('transformer'), name, made_by, formats])}.safetensors"
                known = read_kept(kept, model, formats)
            held = quantized.quantize_layers(model, formats, device=device, known=known)
            if kept is not None and known is None:
                write_kept(kept, held)


def save_activations(
    method: Method,
    models: Mapping[str, nn.Module],
    *,
    checkpointing: str,
    offload: bool,
    host: torch.device | None = None,
) -> None:
    """Let the transformers' blocks compute again what `training.gradient_checkpointing` says, and with `offload` keep
    the rest on the host until the backward pass; `host` stands for it where the device is simulated.

    Raises UserError when the blocks have no layers of the kind that is to be computed again.
    """
    memory = HostMemory(host)
    for name, model in models.items():
        if name.startswith("transformer"):
            blocks = method.family.blocks(name, model)
            offloader = ActivationOffloader(len(blocks), memory) if offload else None
            layers = _layers(method.family, blocks, checkpointing)
            set_activations(model, blocks, checkpointing, layers=layers, offloader=offloader)


def _layers(family: Family, blocks: Sequence[nn.Module], checkpointing: str) -> list[nn.Module]:
    """The layers within blocks that are computed again by themselves."""
    kinds = {"attention": family.attention_layers, "feed_forward": family.feed_forward_layers}
    if checkpointing not in kinds:
        return []
    found = [layer for block in blocks for layer in kinds[checkpointing](block)]
    if not found:
        raise UserError(
            f"training.gradient_checkpointing {checkpointing}: {family.name} names no such layers of its blocks; take "
            "full, every-2 or none"
        )
    return found
