"""Tiny CogVideoX pipelines with random weights, on disk as diffusers folders: a row of tests for each variant."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from tests.families.rows import Row

CHANNELS = 4
TEXT_TOKENS = 40

# 17x64x96 is the size that the 1.0 models were made for, and not square; 1.5 has positions up to 128x128.
_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 17,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT_TOKENS,
}
_ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
_FIRST_FRAME: dict[str, Any] = {**_ROTARY, "in_channels": 2 * CHANNELS}
_PAIRS: dict[str, Any] = {"patch_size_t": 2, "patch_bias": False, "sample_width": 16, "sample_height": 16}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "cogvideox-2b": {},
    "cogvideox-5b": _ROTARY,
    "cogvideox-5b-i2v": {**_FIRST_FRAME, "use_learned_positional_embeddings": True},
    "cogvideox-1.5": {**_ROTARY, **_PAIRS},
    "cogvideox-1.5-i2v": {**_FIRST_FRAME, **_PAIRS, "ofs_embed_dim": 8},
}
_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}


def write_tiny_cogvideox(folder: Path, *, variant: str, seed: int = 0) -> Path:
    """Write one variant to `folder`, in a tenth of a second and under 1 MB, and give `folder` back. The weights are a
    function of `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the accelerators too.
        torch.default_generator.manual_seed(seed)
        parts = {
            "tokenizer": _character_tokenizer(),
            "text_encoder": _text_encoder(),
            "vae": _vae(inverted="1.5" in variant),
            "transformer": _transformer(variant),
            "scheduler": _scheduler(variant),
        }
    kind = diffusers.CogVideoXImageToVideoPipeline if variant.endswith("i2v") else diffusers.CogVideoXPipeline
    kind(**parts).save_pretrained(folder)
    return Path(folder)


def _transformer(variant: str) -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(**{**_TRANSFORMER, **TRANSFORMERS[variant]})
    if TRANSFORMERS[variant].get("use_learned_positional_embeddings"):
        # The class begins with sines and cosines, beside which those would go unseen that come in the table's place.
        transformer.patch_embed.pos_embedding = torch.randn_like(transformer.patch_embed.pos_embedding.float())
    return transformer.eval()


def _vae(*, inverted: bool) -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
        invert_scale_latents=inverted,
    ).eval()


def _scheduler(variant: str) -> Any:
    if variant == "cogvideox-2b":
        return diffusers.CogVideoXDDIMScheduler(**_SCHEDULER, snr_shift_scale=3.0)
    return diffusers.CogVideoXDPMScheduler(**_SCHEDULER, snr_shift_scale=1.0)


def _character_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose words are the printable ASCII characters."""
    characters = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary = special + [(character, -3.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_TOKENS)


def _text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def noisy(call: Mapping[str, Any], shape: tuple[int, int, int]) -> Tensor:
    """The video's channels; those of the given image come after them."""
    return call["hidden_states"][:, :, :CHANNELS].transpose(1, 2)


def answer(prediction_BCFHW: Tensor, call: Mapping[str, Any]) -> Tensor:
    return prediction_BCFHW.transpose(1, 2)


def _row(variant: str, **more: Any) -> Row:
    image_to_video = variant.endswith("i2v")
    return Row(
        family="cogvideox",
        write=partial(write_tiny_cogvideox, variant=variant),
        task=IMAGE_TO_VIDEO if image_to_video else TEXT_TO_VIDEO,
        bucket="17x64x96",
        other_bucket="9x96x64",
        pipeline="CogVideoXImageToVideoPipeline" if image_to_video else "CogVideoXPipeline",
        noisy=noisy,
        answer=answer,
        conditions=("first",) if image_to_video else ("none",),
        **more,
    )


ROWS: dict[str, Row] = {
    variant: _row(variant, options={"learned_positions": "resize"} if "5b-i2v" in variant else {})
    for variant in TRANSFORMERS
}
