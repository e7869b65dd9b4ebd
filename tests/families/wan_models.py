"""Tiny Wan pipelines with random weights, on disk as diffusers folders: a row of tests for each variant."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from tests.families.rows import Row

_TEXT_SIZE, _IMAGE_SIZE, _WIDTH = 32, 8, 48
IMAGE_TOKENS = 17
"""Patches of 8x8 in 32x32 pixels, and one for all."""
UNIPC: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Kind:
    """What is particular to a variant."""

    transformer: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    """What model_index.json says besides the parts."""
    shift: float = 3.0
    has_experts: bool = False
    is_large_vae: bool = False
    """16x16 pixels a latent, with 48 channels."""


_CHANNELS = {"in_channels": 36}
_CLIP = {**_CHANNELS, "image_dim": _IMAGE_SIZE, "added_kv_proj_dim": _WIDTH}
_LARGE = {"in_channels": 48, "out_channels": 48}
KINDS = {
    "wan-2.1": Kind(),
    "wan-2.1-i2v": Kind(_CLIP),
    "wan-2.1-flf2v": Kind({**_CLIP, "pos_embed_seq_len": 2 * IMAGE_TOKENS}, shift=16.0),
    "wan-2.2-5b": Kind(_LARGE, {"expand_timesteps": True}, 5.0, is_large_vae=True),
    "wan-2.2-a14b": Kind(index={"boundary_ratio": 0.875}, shift=12.0, has_experts=True),
    "wan-2.2-a14b-i2v": Kind(_CHANNELS, {"boundary_ratio": 0.9}, 5.0, has_experts=True),
}


def write_tiny_wan(folder: Path, *, variant: str, seed: int = 0, unipc: bool = False) -> Path:
    """Write one of `KINDS` to `folder`, in half a second and under 3 MB, and give `folder` back. The weights are a
    function of `seed` alone; the global random state is left as it was.

    `unipc` takes the schedule that the models are published with, which rounds timesteps down to whole numbers; Euler's
    are not rounded, and can be compared with training.
    """
    kind = KINDS[variant]
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the accelerators too.
        torch.default_generator.manual_seed(seed)
        parts = {
            "tokenizer": _character_tokenizer(),
            "text_encoder": _text_encoder(),
            "vae": _vae(is_large=kind.is_large_vae),
            "transformer": _transformer(kind),
            "transformer_2": _transformer(kind) if kind.has_experts else None,
        }
        images = _clip() if "image_dim" in kind.transformer else {}
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=kind.shift)
    if unipc:
        scheduler = diffusers.UniPCMultistepScheduler(**UNIPC, flow_shift=kind.shift)
    takes_channels = kind.transformer.get("in_channels") == 36
    pipeline_class = diffusers.WanImageToVideoPipeline if takes_channels else diffusers.WanPipeline
    pipeline_class(**parts, **images, **kind.index, scheduler=scheduler).save_pretrained(folder)
    return Path(folder)


def _transformer(kind: Kind) -> Any:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": _WIDTH // 2,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": _TEXT_SIZE,
        "freq_dim": 64,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    transformer = diffusers.WanTransformer3DModel(**{**config, **kind.transformer})
    if kind.transformer.get("pos_embed_seq_len"):
        # The class begins with zeros, under which two images could change places.
        torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    return transformer.eval()


def _vae(*, is_large: bool) -> Any:
    config: dict[str, Any] = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    if is_large:
        config |= {"z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2}
        config |= {"scale_factor_spatial": 16}
    # The class has those of 16 channels only; of neither size are they trivial, so that a wrong normalisation is seen.
    config["latents_mean"] = torch.empty(config["z_dim"]).normal_(std=0.5).tolist()
    config["latents_std"] = torch.empty(config["z_dim"]).uniform_(0.5, 2.0).tolist()
    return diffusers.AutoencoderKLWan(**config).eval()


def _character_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose words are the printable ASCII characters."""
    characters = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=special + [(character, -3.0) for character in characters], extra_ids=0)


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=128,
        d_model=_TEXT_SIZE,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config).eval()


def _clip() -> dict[str, Any]:
    # The last layer but one is read; with two layers that would be the first.
    config = CLIPVisionConfig(
        hidden_size=_IMAGE_SIZE,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        # The usual factor would make all images alike.
        initializer_factor=5.0,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def noisy(call: Mapping[str, Any], shape: tuple[int, int, int]) -> Tensor:
    """The first channels; those of a mask and of given frames come after them."""
    hidden: Tensor = call["hidden_states"]
    return hidden[:, :16] if hidden.shape[1] == 36 else hidden


def answer(prediction_BCFHW: Tensor, call: Mapping[str, Any]) -> Tensor:
    return prediction_BCFHW


def _row(variant: str, *, conditions: tuple[str, ...] = ("none",)) -> Row:
    is_large = KINDS[variant].is_large_vae
    return Row(
        family="wan",
        write=partial(write_tiny_wan, variant=variant),
        task=TEXT_TO_VIDEO if conditions == ("none",) else IMAGE_TO_VIDEO,
        bucket="9x64x96" if is_large else "9x32x48",
        other_bucket="5x96x64" if is_large else "5x48x32",
        pipeline="WanPipeline" if conditions == ("none",) else "WanImageToVideoPipeline",
        noisy=noisy,
        answer=answer,
        conditions=conditions,
    )


ROWS: dict[str, Row] = {
    "wan-2.1": _row("wan-2.1"),
    "wan-2.1-i2v": _row("wan-2.1-i2v", conditions=("first",)),
    "wan-2.1-flf2v": _row("wan-2.1-flf2v", conditions=("first_last",)),
    "wan-2.2-5b": _row("wan-2.2-5b"),
    "wan-2.2-5b-i2v": _row("wan-2.2-5b", conditions=("first",)),
    "wan-2.2-a14b": _row("wan-2.2-a14b"),
    "wan-2.2-a14b-i2v": _row("wan-2.2-a14b-i2v", conditions=("first", "first_last")),
}
