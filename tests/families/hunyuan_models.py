"""Tiny HunyuanVideo folders with random weights: text-to-video, and both kinds of image-to-video."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers as tk
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from tests.families.rows import Row

LATENT_CHANNELS = 4
_TEXT_SIZE, _POOLED_SIZE = 16, 8
_PATCH, _PATCHES = 2, 24
"""24 x 24 patches are the 576 image tokens that the pipeline's template reserves."""
_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before it looks for tokens."""


def write_tiny_hunyuan(folder: Path, *, seed: int = 0, image_condition: str | None = None) -> Path:
    """Write a tiny HunyuanVideo model to `folder` and give `folder` back; `image_condition` is the transformer's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        parts: dict[str, Any] = {
            "tokenizer": llama_tokenizer(),
            "text_encoder": _llama() if image_condition is None else _llava(),
            "tokenizer_2": _clip_tokenizer(),
            "text_encoder_2": _clip(),
            "vae": _vae(),
            "transformer": _transformer(image_condition),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        }
    if image_condition is None:
        HunyuanVideoPipeline(**parts).save_pretrained(folder)
        return folder
    side = _PATCH * _PATCHES
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    HunyuanVideoImageToVideoPipeline(**parts, image_processor=processor).save_pretrained(folder)
    return folder


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Cuts text as Llama 3 does and knows the templates' words, so that they take as many tokens (95 and 103 before the
    caption); other words are read byte by byte."""
    split = tk.pre_tokenizers.Split(tk.Regex(_WORDS), behavior="isolated")
    bytes_ = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = tk.pre_tokenizers.Sequence([split, bytes_])
    known = dict.fromkeys([*_SPECIAL, *sorted(tk.pre_tokenizers.ByteLevel.alphabet())])
    for module in (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video):
        text = module.DEFAULT_PROMPT_TEMPLATE["template"]
        for special in _SPECIAL:
            text = text.replace(special, "\0")
        for piece in text.split("\0"):
            known |= dict.fromkeys(word for word, _ in pre_tokenizer.pre_tokenize_str(piece))
    vocabulary = {token: index for index, token in enumerate(known)}
    tokenizer = tk.Tokenizer(tk.models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, tk.decoders.ByteLevel()
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=f"{_SPECIAL[0]} $A", special_tokens=[(_SPECIAL[0], 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        pad_token=_SPECIAL[-1],
        additional_special_tokens=list(_SPECIAL[2:-1]),
        padding_side="right",
        model_max_length=2048,
    )


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=_TEXT_SIZE,
        intermediate_size=37,
        num_attention_heads=4,
        # The third last hidden state is read; with two layers it would be the plain embedding.
        num_hidden_layers=4,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=_SPECIAL.index("<pad>"),
        # The usual 0.02 would make all texts alike, and hide a wrong layer or a missing mask.
        initializer_range=0.2,
    )


def _llama() -> LlamaModel:
    return LlamaModel(_llama_config()).eval()


def _llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=_PATCH * _PATCHES,
        patch_size=_PATCH,
        initializer_factor=5.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(),
        image_token_index=_SPECIAL.index("<image>"),
        pad_token_id=_SPECIAL.index("<pad>"),
        image_seq_length=_PATCHES**2,
    )
    return LlavaForConditionalGeneration(config).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Every character is a token."""
    alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=_POOLED_SIZE,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        max_position_embeddings=77,
    )
    return CLIPTextModel(config).eval()


def _vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    ).eval()


def _transformer(image_condition: str | None) -> HunyuanVideoTransformer3DModel:
    is_concat = image_condition == "latent_concat"
    return HunyuanVideoTransformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1 if is_concat else LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=not is_concat,
        text_embed_dim=_TEXT_SIZE,
        pooled_projection_dim=_POOLED_SIZE,
        rope_axes_dim=(8, 4, 4),
        image_condition_type=image_condition,
    ).eval()


def noised_channels(inputs: Mapping[str, Any], shape: tuple[int, int, int]) -> Tensor:
    """The noised part of the transformer's input, which is not packed; behind it may stand the image and its mask."""
    latents: Tensor = inputs["hidden_states"][:, :LATENT_CHANNELS]
    assert latents.shape[2:] == shape
    return latents


def whole_answer(answer_BCFHW: Tensor, _: Mapping[str, Any]) -> Tensor:
    """The transformer answers in the shape of the latents."""
    return answer_BCFHW


_IMAGE_ROW = partial(
    Row,
    family="hunyuan",
    task=IMAGE_TO_VIDEO,
    bucket="9x32x48",
    other_bucket="21x48x32",
    pipeline="HunyuanVideoImageToVideoPipeline",
    noisy=noised_channels,
    answer=whole_answer,
    conditions=("first",),
)

ROWS = {
    "hunyuan": Row(
        family="hunyuan",
        write=write_tiny_hunyuan,
        task=TEXT_TO_VIDEO,
        bucket="9x32x48",
        # More than 16 frames: the VAE encodes them in overlapping pieces.
        other_bucket="21x48x32",
        pipeline="HunyuanVideoPipeline",
        noisy=noised_channels,
        answer=whole_answer,
    ),
    "hunyuan-i2v": _IMAGE_ROW(write=partial(write_tiny_hunyuan, image_condition="token_replace")),
    "hunyuan-i2v-33ch": _IMAGE_ROW(write=partial(write_tiny_hunyuan, image_condition="latent_concat")),
}
