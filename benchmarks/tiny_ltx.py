"""Tiny LTX-Video pipelines with random weights, on disk as any diffusers folder, for tests and benchmarks."""

from __future__ import annotations

import string
from collections.abc import Sequence
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
            "tokenizer": build_tokenizer(),
            "text_encoder": build_text_encoder(_TEXT_SIZE, num_layers=2),
            "vae": _vae(causal=causal),
            "transformer": build_transformer(
                _LATENT_CHANNELS, text_size=_TEXT_SIZE, num_heads=num_heads, head_size=8, num_layers=num_layers
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(**({} if causal else _DYNAMIC_SHIFT)),
        }
    pipeline = (LTXConditionPipeline if causal else LTXPipeline)(**parts)
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_tokenizer(words: Sequence[str] = ()) -> T5Tokenizer:
    """A T5 tokenizer that takes these words whole, and any other by its printable ASCII characters."""
    characters = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    known = [(f"\u2581{word}", -1.0) for word in words]
    vocabulary = special + known + [(character, -4.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=128)


def build_text_encoder(
    size: int, *, num_layers: int, vocab_size: int = 128, head_size: int = 8, hidden_size: int = 37
) -> T5EncoderModel:
    """A T5 encoder with random weights."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=size,
        d_kv=head_size,
        d_ff=hidden_size,
        num_layers=num_layers,
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


def build_transformer(
    latent_channels: int, *, text_size: int, num_heads: int, head_size: int, num_layers: int
) -> LTXVideoTransformer3DModel:
    """LTX-Video's transformer with random weights, `num_heads * head_size` wide."""
    return LTXVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=num_heads,
        attention_head_dim=head_size,
        cross_attention_dim=num_heads * head_size,
        num_layers=num_layers,
        caption_channels=text_size,
    ).eval()
