"""HunyuanVideo's text: a caption through CLIP and, in a template, through Llama or, with the first frame, LLaVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetrainers.errors import UserError
from finetrainers.families.parts import count_tokens, load_tokenizer, pad_tokens
from finetrainers.types import TokenCount

# Shape suffixes: B batch, L tokens as written, K tokens kept for the transformer, C channels, H height, W width.

NUM_CAPTION_TOKENS = 256
NUM_POOLED_TOKENS = 77
UNUSED_LAYERS = 2
"""Of Llama's layers the last two are not read."""
ASSISTANT = 4
"""Tokens of the assistant's header that the image-to-video pipeline cuts out behind the caption."""


def load_llama_tokenizer(folder: Path) -> Any:
    """Llama's tokenizer, as its tokenizer.json describes it. Raises UserError when it pads on the left."""
    from transformers import PreTrainedTokenizerFast

    # The published folders name LlamaTokenizerFast, which transformers 5 builds anew in the manner of Llama 2, whatever
    # tokenizer.json says: https://github.com/huggingface/transformers/issues/45488.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    if tokenizer.padding_side != "right":
        raise UserError(
            f"{folder}: its tokenizer pads on the {tokenizer.padding_side}, and HunyuanVideo reads text from the left; "
            "set padding_side to right in tokenizer/tokenizer_config.json"
        )
    return tokenizer


def load_tokenizers(folder: Path, *, sees_image: bool) -> dict[str, Any]:
    """Both tokenizers and, for LLaVA, its image processor, by the names of their folders."""
    tokenizers = {"tokenizer": load_llama_tokenizer(folder), "tokenizer_2": load_tokenizer(folder, "tokenizer_2")}
    if sees_image:
        from transformers import AutoImageProcessor

        tokenizers["image_processor"] = AutoImageProcessor.from_pretrained(folder / "image_processor")
    return tokenizers


def num_kept_tokens(image_stride: int | None) -> int:
    """Length of the text that the transformer reads; of an image's tokens it keeps one in `image_stride`."""
    if image_stride is None:
        return NUM_CAPTION_TOKENS
    return len(_kept_image_tokens(image_stride)) + NUM_CAPTION_TOKENS - ASSISTANT


def tokenize_captions(tokenizers: Mapping[str, Any], captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions for Llama, in the text-to-video template, and for CLIP, as they are."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    start = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    tokens = _fill_template(tokenizers["tokenizer"], captions, DEFAULT_PROMPT_TEMPLATE)
    kept_BK = torch.arange(start, tokens["input_ids"].shape[1]).expand(len(captions), -1)
    return {
        "llama_input_ids": tokens["input_ids"],
        "llama_attention_mask": tokens["attention_mask"],
        "kept_positions": kept_BK,
        "kept_mask": tokens["attention_mask"].gather(1, kept_BK),
        "clip_input_ids": _clip_tokens(tokenizers, captions),
    }


def tokenize_with_images(
    tokenizers: Mapping[str, Any], captions: Sequence[str], images: Sequence[Tensor], *, image_token: int, stride: int
) -> dict[str, Tensor]:
    """Captions for LLaVA, in the image-to-video template with their images, and for CLIP, as they are.

    What is kept comes in the order in which the transformer reads it: one in `stride` of the image's tokens, then the
    caption and what follows it, without the header of the assistant's answer.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
    from PIL import Image

    image_start, num_image = DEFAULT_PROMPT_TEMPLATE["image_emb_start"], DEFAULT_PROMPT_TEMPLATE["image_emb_len"]
    tokens = _fill_template(tokenizers["tokenizer"], captions, DEFAULT_PROMPT_TEMPLATE)
    ids_BL, mask_BL = tokens["input_ids"], tokens["attention_mask"]
    is_image_BL = ids_BL == image_token
    for caption, row in zip(captions, is_image_BL.tolist(), strict=True):
        if [place for place, is_image in enumerate(row) if is_image] != [image_start]:
            raise UserError(f"the tokenizer finds an image elsewhere than in the template, with caption {caption!r}")
    # The one token that stands for the image becomes as many as the image has.
    repeats = torch.ones(ids_BL.shape[1], dtype=torch.long)
    repeats[image_start] = num_image
    kept_text_BK = _kept_text(tokenizers["tokenizer"], ids_BL, DEFAULT_PROMPT_TEMPLATE["crop_start"])
    kept_image_BK = torch.tensor(_kept_image_tokens(stride)).expand(len(captions), -1)
    mask_image_BK = mask_BL.new_ones(kept_image_BK.shape)
    attention_BL = mask_BL.repeat_interleave(repeats, dim=1)
    pictures = [Image.fromarray(image_CHW.permute(1, 2, 0).cpu().numpy()) for image_CHW in images]
    return {
        "llama_input_ids": ids_BL.repeat_interleave(repeats, dim=1),
        "llama_attention_mask": attention_BL,
        "llama_position_ids": (attention_BL.cumsum(-1) - 1).masked_fill(attention_BL == 0, 1),
        "llama_pixel_values": tokenizers["image_processor"](pictures, return_tensors="pt").pixel_values,
        "kept_positions": torch.cat([kept_image_BK, kept_text_BK + num_image - 1], dim=1),
        "kept_mask": torch.cat([mask_image_BK, mask_BL.gather(1, kept_text_BK)], dim=1),
        "clip_input_ids": _clip_tokens(tokenizers, captions),
    }


def embed_tokens(encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `tokenize_captions` or `tokenize_with_images` made, as the transformer takes it."""
    llama, clip = encoders["text_encoder"], encoders["text_encoder_2"]
    inputs: dict[str, Any] = {
        name.removeprefix("llama_"): tensor.to(llama.device)
        for name, tensor in tokens.items()
        if name.startswith("llama_")
    }
    if "pixel_values" in inputs:
        # LLaVA would make logits of the whole vocabulary for each token, which nobody reads.
        inputs |= {"logits_to_keep": 1}
    states = llama(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    kept_BK1 = tokens["kept_positions"].to(llama.device)[..., None]
    return {
        "prompt_embeds": states[-(UNUSED_LAYERS + 1)].take_along_dim(kept_BK1, dim=1),
        "prompt_attention_mask": tokens["kept_mask"].to(llama.device).bool(),
        "pooled_prompt_embeds": clip(tokens["clip_input_ids"].to(clip.device)).pooler_output,
    }


def count_caption_tokens(tokenizer: Any, captions: Sequence[str], *, sees_image: bool) -> list[TokenCount]:
    """Llama's tokens of each caption by itself. Behind a caption that is cut, the image-to-video pipeline cuts as many
    tokens again as the assistant's header has."""
    limit = NUM_CAPTION_TOKENS - ASSISTANT * sees_image
    return count_tokens(tokenizer, captions, limit, add_special_tokens=False)


def _fill_template(tokenizer: Any, captions: Sequence[str], template: Mapping[str, Any]) -> dict[str, Tensor]:
    filled = [template["template"].format(caption) for caption in captions]
    return pad_tokens(tokenizer, filled, NUM_CAPTION_TOKENS + template["crop_start"])


def _clip_tokens(tokenizers: Mapping[str, Any], captions: Sequence[str]) -> Tensor:
    return pad_tokens(tokenizers["tokenizer_2"], captions, NUM_POOLED_TOKENS)["input_ids"]


def _kept_image_tokens(stride: int) -> range:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

    return range(DEFAULT_PROMPT_TEMPLATE["image_emb_start"], DEFAULT_PROMPT_TEMPLATE["image_emb_end"], stride)


def _kept_text(tokenizer: Any, ids_BL: Tensor, start: int) -> Tensor:
    """Places [B, K] of the caption and of what follows it, without the tokens of the assistant's header."""
    length = ids_BL.shape[1]
    is_header_BL = ids_BL == tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    last_header_B = (is_header_BL * torch.arange(length)).amax(dim=1)
    # Of a caption that is too long the third header is cut off, and the pipeline takes the end of the text for it.
    is_whole_B = is_header_BL.sum(dim=1) > 2
    end_B = torch.where(is_whole_B, last_header_B, length - 1) + 1
    places_K = torch.arange(start, length - ASSISTANT)
    return places_K + ASSISTANT * (places_K >= (end_B - ASSISTANT)[:, None])
