"""Tiny LTX-Video pipelines with random weights, on disk as any diffusers folder, for tests and benchmarks."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

_LATENT_CHANNELS = 8
_HEAD_SIZE = 8
_TEXT_SIZE = 32

# As LTX-Video 0.9.0 and 0.9.1 are published; from 0.9.5 on the pipeline brings its own sigmas.
_DYNAMIC_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}

# The structure of the 0.9.0 and of the 0.9.5 VAE at a width of 8: both make 8x32x32 pixels one latent.
_VAE: dict[str, Any] = {
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1,) * 4,
    "timestep_conditioning": False,
}
_VAE_095: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 32, 64),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2, 2, 2),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
    "timestep_conditioning": True,
}


def write_tiny_ltx(
    folder: Path, *, seed: int = 0, causal: bool = False, num_heads: int = 4, num_layers: int = 2
) -> Path:
    """Write a tiny LTX-Video model to `folder`, in half a second and under 5 MB, and give `folder` back.

    The weights are random but a function of `seed` alone; the global random state is left as it was. `causal` writes
    the kind of 0.9.5 and later: its VAE, which decodes at a timestep, and `LTXConditionPipeline`. The transformer is
    `8 * num_heads` wide.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the accelerators too.
        torch.default_generator.manual_seed(seed)
        parts = {
            "tokenizer": _character_tokenizer(),
            "text_encoder": _text_encoder(),
            "vae": _vae(causal=causal),
            "transformer": _transformer(num_heads=num_heads, num_layers=num_layers),
            "scheduler": FlowMatchEulerDiscreteScheduler(**({} if causal else _DYNAMIC_SHIFT)),
        }
    pipeline = (LTXConditionPipeline if causal else LTXPipeline)(**parts)
    pipeline.save_pretrained(folder)
    return Path(folder)


def _character_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose words are the printable ASCII characters."""
    characters = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary = special + [(character, -3.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=128)


def _text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=128,
        d_model=_TEXT_SIZE,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def _vae(*, causal: bool) -> AutoencoderKLLTXVideo:
    config = _VAE_095 if causal else _VAE
    vae = AutoencoderKLLTXVideo(latent_channels=_LATENT_CHANNELS, patch_size=4, patch_size_t=1, **config)
    # The class leaves them at 0 and 1, under which a wrong normalisation of latents would go unseen.
    vae.latents_mean.normal_(std=0.5)
    vae.latents_std.uniform_(0.5, 2.0)
    return vae.eval()


def _transformer(*, num_heads: int, num_layers: int) -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_attention_heads=num_heads,
        attention_head_dim=_HEAD_SIZE,
        cross_attention_dim=num_heads * _HEAD_SIZE,
        num_layers=num_layers,
        caption_channels=_TEXT_SIZE,
    ).eval()
