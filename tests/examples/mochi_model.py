"""A tiny Mochi-1 with random weights, on disk as a diffusers folder, and what the tests know of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    MochiPipeline,
    MochiTransformer3DModel,
)
from torch import Tensor

from benchmarks.tiny_ltx import write_tiny_ltx
from finetrainers.families.base import TEXT_TO_VIDEO
from tests.families.rows import Row

CHANNELS = 12


def write_tiny_mochi(folder: Path, *, zeroes_empty_prompt: bool = True, seed: int = 0) -> Path:
    """Write the model to `folder`, under 5 MB, and give `folder` back. The weights are a function of `seed` alone; the
    global random state is left as it was."""
    # Both read text by T5.
    text = LTXPipeline.from_pretrained(write_tiny_ltx(folder, seed=seed))
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the accelerators too.
        torch.default_generator.manual_seed(seed)
        pipeline = MochiPipeline(
            tokenizer=text.tokenizer,
            text_encoder=text.text_encoder,
            vae=_vae(),
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            force_zeros_for_empty_prompt=zeroes_empty_prompt,
        )
    pipeline.save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKLMochi:
    return AutoencoderKLMochi(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=torch.linspace(-0.5, 0.6, CHANNELS).tolist(),
        latents_std=torch.linspace(0.5, 2.0, CHANNELS).tolist(),
        scaling_factor=0.7,
    ).eval()


def _transformer() -> MochiTransformer3DModel:
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=CHANNELS,
        text_embed_dim=32,
        time_embed_dim=4,
    )
    # The class begins with zeros, under which a token would not know its place.
    transformer.pos_frequencies.data.normal_()
    return transformer.eval()


def noisy(call: Mapping[str, Any], shape: tuple[int, int, int]) -> Tensor:
    return call["hidden_states"]


def answer(prediction_BCFHW: Tensor, call: Mapping[str, Any]) -> Tensor:
    return -prediction_BCFHW


def timestep(call: Mapping[str, Any]) -> Tensor:
    """Mochi's time runs from noise to the clip."""
    return 1000 - call["timestep"].float()


_LAYOUT: dict[str, Any] = {
    "family": "mochi",
    "task": TEXT_TO_VIDEO,
    "bucket": "13x32x48",
    "other_bucket": "7x48x32",
    "pipeline": "MochiPipeline",
    "noisy": noisy,
    "answer": answer,
    "timestep": timestep,
    "options": {"family": "examples.own_family.mochi.Mochi"},
}
ROWS = {
    "own-family": Row(write=write_tiny_mochi, **_LAYOUT),
    "own-family-empty-prompt-kept": Row(write=partial(write_tiny_mochi, zeroes_empty_prompt=False), **_LAYOUT),
}
