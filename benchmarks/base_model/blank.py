"""Writes the bundled model as it is before its transformer has learned anything: random weights around a trained VAE.

python benchmarks/base_model/blank.py --vae vae --output blank
"""

from __future__ import annotations

import argparse
import re
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from finetrainers.demo.clips import scenes_in_order

WIDTH, NUM_HEADS, NUM_LAYERS = 192, 4, 5
TEXT_SIZE = 64


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows the words of the captions whole, and any other word by its letters."""
    captions = (scene.caption for scene, _ in zip(scenes_in_order(0), range(5000), strict=False))
    words = sorted({word for caption in captions for word in re.findall(r"\w+", caption)})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    known = [(f"\u2581{word}", -1.0) for word in words]
    letters = [(letter, -4.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=special + known + letters, extra_ids=0, model_max_length=128)


def build_text_encoder(num_words: int) -> T5EncoderModel:
    """Random, and left so: each word is a direction of its own, which is all that such captions need."""
    config = T5Config(
        vocab_size=num_words,
        d_model=TEXT_SIZE,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def build_transformer(in_channels: int) -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=in_channels,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=WIDTH // NUM_HEADS,
        cross_attention_dim=WIDTH,
        num_layers=NUM_LAYERS,
        caption_channels=TEXT_SIZE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    vae = AutoencoderKLLTXVideo.from_pretrained(options.vae)
    tokenizer = build_tokenizer()
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=build_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=build_transformer(vae.config.latent_channels),
    )
    pipeline.save_pretrained(options.output)


if __name__ == "__main__":
    main()
