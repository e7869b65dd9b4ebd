"""Writes the bundled model as it is before its transformer has learned anything: random weights around a trained VAE.

python -m benchmarks.base_model.blank --vae vae --output blank
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline

from benchmarks.tiny_ltx import build_text_encoder, build_tokenizer, build_transformer
from finetrainers.demo.clips import every_scene

TEXT_SIZE = 64


def caption_words() -> list[str]:
    """Every word that a caption of a scene can have."""
    return sorted({word for scene in every_scene() for word in re.findall(r"\w+", scene.caption)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    vae = AutoencoderKLLTXVideo.from_pretrained(options.vae)
    tokenizer = build_tokenizer(caption_words())
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        # Random, and left so: each word is a direction of its own, which is all that such captions need.
        text_encoder=build_text_encoder(
            TEXT_SIZE, num_layers=1, vocab_size=len(tokenizer), head_size=16, hidden_size=128
        ),
        tokenizer=tokenizer,
        transformer=build_transformer(
            vae.config.latent_channels, text_size=TEXT_SIZE, num_heads=4, head_size=48, num_layers=5
        ),
    )
    pipeline.save_pretrained(options.output)


if __name__ == "__main__":
    main()
