"""Rows of LTX-Video; the models themselves are those of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny_ltx import write_tiny_ltx
from finetrainers.demo.bundled import copy_bundled_model
from tests.families.rows import Row


def noisy(call: Mapping[str, Any], shape: tuple[int, int, int]) -> Tensor:
    """The video's tokens, less those of given frames in front of it."""
    frames, height, width = shape
    return call["hidden_states"][:, -frames * height * width :].transpose(1, 2).unflatten(2, shape)


def answer(prediction_BCFHW: Tensor, call: Mapping[str, Any]) -> Tensor:
    packed = prediction_BCFHW.flatten(2).transpose(1, 2)
    in_front = call["hidden_states"].shape[1] - packed.shape[1]
    return torch.cat([torch.zeros(len(packed), in_front, packed.shape[2]), packed], dim=1)


OLD, CAUSAL = write_tiny_ltx, partial(write_tiny_ltx, causal=True)
LAYOUT: dict[str, Any] = {
    "family": "ltx",
    "bucket": "17x64x96",
    "other_bucket": "9x96x64",
    "noisy": noisy,
    "answer": answer,
}
# The pipeline adds a little noise to given frames while it samples, against stillness; training gives them clean.
WITHOUT_NOISE = {"image_cond_noise_scale": 0.0}
ROWS = {
    "ltx-0.9.0": Row(write=OLD, task="text-to-video", pipeline="LTXPipeline", **LAYOUT),
    "ltx-0.9.0-i2v": Row(
        write=OLD,
        task="image-to-video",
        pipeline="LTXImageToVideoPipeline",
        conditions=("first",),
        **LAYOUT,
    ),
    "ltx-0.9.5": Row(write=CAUSAL, task="text-to-video", pipeline="LTXConditionPipeline", **LAYOUT),
    "ltx-0.9.5-i2v": Row(
        write=CAUSAL,
        task="image-to-video",
        pipeline="LTXConditionPipeline",
        conditions=("first", "none", "first_last", "prefix-9"),
        call=WITHOUT_NOISE,
        **LAYOUT,
    ),
    # Its VAE has other strides than the published ones.
    "ltx-bundled": Row(write=copy_bundled_model, task="text-to-video", pipeline="LTXPipeline", **LAYOUT),
}
