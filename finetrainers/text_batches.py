"""Captions in batches of one length, so that the text encoder works on words and not on padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetrainers.families.base import Family

# Shape suffixes: B batch, L text tokens.

TEXTS_AT_ONCE = 8
LENGTH_STEP = 32
"""Captions are padded to a multiple of so many tokens: a few lengths, each with whole batches."""


def plan_batches(family: Family, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[list[int]]:
    """The indices of captions that are embedded together, in groups of one padded length: the length at which a caption
    is embedded is its own affair, whatever the others are. The longest come first, which need the most memory."""
    lengths = [0] * len(captions)
    if _is_shortened(family):
        for start in range(0, len(captions), TEXTS_AT_ONCE):
            tokens = family.tokenize(tokenizers, captions[start : start + TEXTS_AT_ONCE])
            lengths[start : start + TEXTS_AT_ONCE] = _padded_lengths(family, tokens).tolist()
    batches = []
    for length in sorted(set(lengths), reverse=True):
        group = [index for index, own in enumerate(lengths) if own == length]
        batches += [group[start : start + TEXTS_AT_ONCE] for start in range(0, len(group), TEXTS_AT_ONCE)]
    return batches


def embed_batch(family: Family, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `Family.embed` makes of tokens, in the same shapes. Padding that nothing reads is not worked on, and gives
    zeros."""
    if not _is_shortened(family):
        return family.embed(encoders, tokens)
    excess = tokens[family.padded_tokens[0]].shape[1] - int(_padded_lengths(family, tokens).max())
    short = {name: tokens[name][:, : tokens[name].shape[1] - excess] for name in family.padded_tokens}
    embedded = family.embed(encoders, {**tokens, **short})
    blank = family.blank_text()
    return {name: _filled(tensor, blank[name].shape[0]) for name, tensor in embedded.items()}


def _is_shortened(family: Family) -> bool:
    # Tokens of an image would have to be made to know where the text ends, and they are most of what is embedded.
    return bool(family.padded_tokens) and not family.text_sees_image


def _padded_lengths(family: Family, tokens: Mapping[str, Tensor]) -> Tensor:
    """To how many tokens each caption is padded [B]."""
    mask_BL = tokens[family.padded_tokens[0]].cpu() > 0
    most = mask_BL.shape[1]
    ends_B = (mask_BL * torch.arange(1, most + 1)).amax(dim=1).clamp(min=1)
    return (-(-ends_B // LENGTH_STEP) * LENGTH_STEP).clamp(max=most)


def _filled(tensor: Tensor, length: int) -> Tensor:
    """With zeros behind the second dimension, up to the length."""
    missing = length - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1) if missing else tensor
