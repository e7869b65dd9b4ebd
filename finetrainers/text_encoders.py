"""Loads text encoders to embed captions with, in as little memory as is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetrainers.engines.base import replace_tensors
from finetrainers.families.base import Family
from finetrainers.memory.quantized import choose_formats, quantize_layers
from finetrainers.memory.streaming import BlockStream


def load_text_encoders(
    family: Family, device: torch.device, dtype: torch.dtype, *, weights_format: str | None, is_streamed: bool
) -> dict[str, Any]:
    """A family's text encoders by name, ready to embed on the device: in low precision layer by layer, so that they are
    never there whole in another one, and with layers that stay on the host where they are streamed."""
    if weights_format is None and not is_streamed:
        return family.load_text_encoders(device, dtype)
    encoders = family.load_text_encoders(torch.device("cpu"), dtype)
    if weights_format is not None:
        lower_precision(family, encoders, weights_format, device=device)
    for name, encoder in encoders.items():
        if is_streamed:
            _stream(family, name, encoder, device)
        else:
            encoder.to(device)
    return encoders


def lower_precision(family: Family, encoders: Mapping[str, Any], format: str, *, device: torch.device) -> None:
    """Hold the weights of a family's large text encoder in a format that is made on the device."""
    # A second text encoder, which only gives a summary of the prompt, is small.
    encoder = encoders["text_encoder"]
    formats = choose_formats(
        encoder,
        family.blocks("text_encoder", encoder),
        format,
        precise=family.precise_layers,
        sensitive=family.sensitive_layers,
    )
    quantize_layers(encoder, formats, device=device)


def streamed_layers(family: Family, name: str, encoder: Any) -> list[nn.Module]:
    """The layers of an encoder that are streamed where it is."""
    blocks = family.blocks(name, encoder)
    kinds = Counter(type(block) for block in blocks)
    # Of those that do not repeat, embeddings are asked where the encoder is.
    return [each for each in blocks if kinds[type(each)] > 1]


def _stream(family: Family, name: str, encoder: Any, device: torch.device) -> None:
    """Leave the layers of an encoder on the host, and bring the rest to the device."""
    stream = BlockStream(streamed_layers(family, name, encoder), device=device)
    for block in stream.blocks:
        stream.park(block)
    replace_tensors(encoder, lambda tensor: tensor.to(device))
    stream.start()
