"""Renders the clips that the bundled model's transformer is trained on.

python benchmarks/base_model/clips.py --output clips
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
from finetrainers.demo.clips import Course, Scene, render_scene, scenes_in_order

SEED = 0
NUM_HELD_OUT = 200
"""Scenes that no clip shows: their captions are the prompts of the evaluation."""
RATES = (8.0, 8.0, 8.0, 16.0, 25.0)
"""Frames per second, one drawn for each clip. A motion takes 17 frames at any of them."""
SIZE = {"num_frames": 17, "height": 96, "width": 96}


def scenes() -> tuple[list[Scene], list[Scene]]:
    """All scenes: those that are shown, and those that are held out."""
    every = list(dict.fromkeys(itertools.islice(scenes_in_order(SEED), 5000)))
    return every[NUM_HELD_OUT:], every[:NUM_HELD_OUT]


def vary(scene: Scene, draw: random.Random) -> tuple[Scene, str]:
    """What is shown, and its caption: at times without the background, at times after a word that says nothing."""
    caption = replace(scene, background=None).caption if draw.random() < 0.2 else scene.caption
    if draw.random() < 0.1:
        word = "".join(draw.choices(string.ascii_letters, k=draw.randint(3, 8)))
        caption = f"{word} {caption}"
    return scene, caption


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
            scene, caption = vary(shown[index % len(shown)], draw)
            frames_FHWC = render_scene(scene, course=Course.draw(scene.motion, draw), **SIZE)
            name = f"{index:05d}.mp4"
            write_video(options.output / name, frames_FHWC, draw.choice(RATES))
            rows.writerow([name, caption])


if __name__ == "__main__":
    main()
