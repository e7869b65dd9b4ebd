"""Asks a small model for scenes that it was never shown, and counts how often simple measures see what was asked for.

python benchmarks/base_model/evaluate.py MODEL --output evaluation.json
"""

from __future__ import annotations

import argparse
import json
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LTXPipeline

from benchmarks.base_model.clips import scenes
from benchmarks.machine import describe_machine
from finetrainers.demo.clips import Scene
from finetrainers.demo.measures import recognise

RECORD = Path(__file__).parents[1] / "results" / "base_model.json"
SIZE = {"num_frames": 17, "height": 64, "width": 64, "frame_rate": 8}
BATCH = 20


def render(pipeline: Any, prompts: list[str], *, seed: int, steps: int, guidance_scale: float) -> np.ndarray:
    """Videos as uint8 NFHWC, each from noise of its own."""
    videos = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        draws = [torch.Generator().manual_seed(seed + first + index) for index in range(len(batch))]
        found = pipeline(
            prompt=batch,
            negative_prompt=[""] * len(batch),
            generator=draws,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=128,
            output_type="np",
            **SIZE,
        ).frames
        videos.append((found * 255).round().astype(np.uint8))
    return np.concatenate(videos)


def judge(videos_NFHWC: np.ndarray, asked: list[Scene]) -> dict[str, Any]:
    """The share of videos that show the colour, the motion and the shape asked for, and what each wrong one shows."""
    wrong: list[dict[str, str]] = []
    counts = dict.fromkeys(("colour", "motion", "shape", "colour_and_motion", "all"), 0)
    for video_FHWC, scene in zip(videos_NFHWC, asked, strict=True):
        seen = recognise(video_FHWC)
        right = {name: seen is not None and getattr(seen, name) == getattr(scene, name) for name in _PARTS}
        counts["colour_and_motion"] += right["colour"] and right["motion"]
        counts["all"] += all(right.values())
        for name in _PARTS:
            counts[name] += right[name]
        if not all(right.values()):
            wrong.append({"asked": scene.caption, "seen": seen.caption if seen else "nothing"})
    return {**{name: round(count / len(asked), 4) for name, count in counts.items()}, "wrong": wrong}


_PARTS = ("colour", "motion", "shape")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--transformer", type=Path, help="a transformer folder in the place of the model's own")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--videos", type=Path, help="where the videos go, as one npy")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = LTXPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    if options.transformer:
        loaded = type(pipeline.transformer).from_pretrained(options.transformer)
        pipeline.transformer.load_state_dict(loaded.state_dict())
    pipeline.set_progress_bar_config(disable=True)
    asked = scenes()[1][: options.count]
    started = time.perf_counter()
    settings = {"steps": options.steps, "guidance_scale": options.guidance_scale, "seed": options.seed}
    videos_NFHWC = render(pipeline, [scene.caption for scene in asked], **settings)
    seconds = (time.perf_counter() - started) / len(asked)
    weights = (options.transformer or options.model / "transformer") / "diffusion_pytorch_model.safetensors"
    found = {"transformer_sha256": sha256(weights.read_bytes()).hexdigest(), "machine": describe_machine()}
    found |= {"prompts": len(asked), **settings, "seconds_per_video": round(seconds, 3), **judge(videos_NFHWC, asked)}
    print(json.dumps({name: value for name, value in found.items() if name not in ("wrong", "machine")}))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.videos:
        np.save(options.videos, videos_NFHWC)


if __name__ == "__main__":
    main()
