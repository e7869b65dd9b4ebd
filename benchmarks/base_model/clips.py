"""Renders the clips that the bundled model's transformer is trained on.

python -m benchmarks.base_model.clips --output clips
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import string
from dataclasses import replace
from pathlib import Path

from finetrainers.data.video import write_video
from finetrainers.demo.bundled import NUM_FRAMES
from finetrainers.demo.clips import Course, Scene, every_scene, render_scene, scenes_in_order

SEED = 0
NUM_HELD_OUT = 200
"""Scenes that no clip shows: their captions are the prompts of the evaluation."""
RATES = (8.0, 8.0, 8.0, 16.0, 25.0)
"""Frames per second, one drawn for each clip. A motion takes 17 frames at any of them."""
SIZE = {"num_frames": NUM_FRAMES, "height": 96, "width": 96}
"""Larger than they are trained, because colours in an mp4 have half the resolution."""


def scenes() -> tuple[list[Scene], list[Scene]]:
    """All scenes: those that are shown, and those that are held out."""
    every = list(itertools.islice(scenes_in_order(SEED), len(every_scene())))
    return every[NUM_HELD_OUT:], every[:NUM_HELD_OUT]


def vary_caption(scene: Scene, draw: random.Random) -> str:
    """A scene's caption, at times without the background, at times after a word that says nothing."""
    caption = replace(scene, background=None).caption if draw.random() < 0.2 else scene.caption
    if draw.random() < 0.1:
        word = "".join(draw.choices(string.ascii_letters, k=draw.randint(3, 8)))
        caption = f"{word} {caption}"
    return caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    shown, _ = scenes()
    with (options.output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for index in range(options.count):
            scene = shown[index % len(shown)]
            caption = vary_caption(scene, draw)
            frames_FHWC = render_scene(scene, course=Course.draw(scene.motion, draw), **SIZE)
            name = f"{index:05d}.mp4"
            write_video(options.output / name, frames_FHWC, draw.choice(RATES))
            rows.writerow([name, caption])


if __name__ == "__main__":
    main()
