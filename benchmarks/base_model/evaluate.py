"""Asks a small model for scenes that it was never shown, and counts how often simple measures see what was asked for.

python -m benchmarks.base_model.evaluate finetrainers/demo/ltx-shapes --videos looked-at
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
from finetrainers.data.video import write_video
from finetrainers.demo.bundled import FPS, HEIGHT, NUM_FRAMES, WIDTH
from finetrainers.demo.clips import Scene
from finetrainers.demo.measures import recognise
from finetrainers.folder import slug

RECORD = Path(__file__).parents[1] / "results" / "base_model.json"
BATCH = 20
PARTS = ("colour", "motion", "shape")


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
            num_frames=NUM_FRAMES,
            height=HEIGHT,
            width=WIDTH,
            frame_rate=FPS,
        ).frames
        videos.append((found * 255).round().astype(np.uint8))
    return np.concatenate(videos)


def judge(videos_NFHWC: np.ndarray, asked: list[Scene]) -> dict[str, Any]:
    """The share of videos that show the colour, the motion and the shape asked for, and what each wrong one shows."""
    seen = [recognise(video_FHWC) for video_FHWC in videos_NFHWC]
    right_NP = np.array(
        [
            [found is not None and getattr(found, part) == getattr(scene, part) for part in PARTS]
            for found, scene in zip(seen, asked, strict=True)
        ]
    )
    shares = dict(zip(PARTS, right_NP.mean(0).tolist(), strict=True))
    shares |= {"colour_and_motion": float(right_NP[:, :2].all(1).mean()), "all": float(right_NP.all(1).mean())}
    wrong = [
        {"asked": scene.caption, "seen": found.caption if found else "nothing"}
        for scene, found, right_P in zip(asked, seen, right_NP, strict=True)
        if not right_P.all()
    ]
    return {**{name: round(share, 4) for name, share in shares.items()}, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--videos", type=Path, help="a folder for the videos")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = LTXPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    asked = scenes()[1][: options.count]
    started = time.perf_counter()
    settings = {"steps": options.steps, "guidance_scale": options.guidance_scale, "seed": options.seed}
    videos_NFHWC = render(pipeline, [scene.caption for scene in asked], **settings)
    seconds = (time.perf_counter() - started) / len(asked)
    weights = options.model / "transformer" / "diffusion_pytorch_model.safetensors"
    found = {"transformer_sha256": sha256(weights.read_bytes()).hexdigest(), "machine": describe_machine()}
    found |= {"prompts": len(asked), **settings, "seconds_per_video": round(seconds, 3), **judge(videos_NFHWC, asked)}
    print(json.dumps({name: value for name, value in found.items() if name not in ("wrong", "machine")}))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.videos:
        for number, (video_FHWC, scene) in enumerate(zip(videos_NFHWC, asked, strict=True)):
            write_video(options.videos / f"{number:03d}-{slug(scene.caption)}.mp4", video_FHWC, FPS)


if __name__ == "__main__":
    main()
