"""Short clips of coloured shapes that move, with true captions: a dataset that needs no download."""

from __future__ import annotations

import csv
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetrainers.data.video import write_video

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (222, 56, 49),
    "yellow": (246, 205, 66),
    "green": (62, 171, 92),
    "orange": (240, 140, 46),
    "pink": (240, 128, 178),
    "white": (245, 245, 240),
}
BACKGROUNDS = {
    "dark blue": (24, 38, 88),
    "black": (18, 18, 20),
    "light blue": (150, 196, 232),
    "purple": (96, 58, 130),
}
DIRECTIONS = {"to the right": (1, 0), "to the left": (-1, 0), "upwards": (0, -1), "downwards": (0, 1)}
"""Unit vectors in the picture, x to the right and y down."""

_TRAVEL = 0.5
"""Share of the picture that a shape crosses, about its middle."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows, in the words of its caption."""

    shape: str
    colour: str
    background: str
    direction: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} moves {self.direction} over a {self.background} background"


def render_clips(
    folder: Path, count: int, *, num_frames: int = 49, height: int = 96, width: int = 96, fps: float = 16, seed: int = 0
) -> Path:
    """Render `count` captioned clips into `folder`, and give the path of their table, `metadata.csv`.

    No two clips show the same scene before every scene was shown; which come first is drawn from `seed`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [Scene(*parts) for parts in itertools.product(SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS)]
    draw = random.Random(seed)
    draw.shuffle(scenes)
    table = folder / "metadata.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for index in range(count):
            scene = scenes[index % len(scenes)]
            name = f"{index:03d}_{scene.colour}_{scene.shape}.mp4"
            radius = draw.uniform(0.16, 0.22)
            video = render_scene(scene, num_frames=num_frames, height=height, width=width, radius=radius)
            write_video(folder / name, video, fps)
            rows.writerow([name, scene.caption])
    return table


def render_scene(scene: Scene, *, num_frames: int, height: int, width: int, radius: float = 0.2) -> np.ndarray:
    """The frames of a scene, uint8 FHWC; `radius` is the shape's size as a share of the picture's shorter side."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    shade = np.linspace(1.12, 0.88, height, dtype=np.float32)[:, None, None]
    background = np.array(BACKGROUNDS[scene.background], np.float32) * shade * np.ones((1, width, 1), np.float32)
    colour = np.array(COLOURS[scene.colour], np.float32)
    step_x, step_y = DIRECTIONS[scene.direction]
    frames: np.ndarray = np.empty((num_frames, height, width, 3), np.uint8)
    for frame, way in enumerate(np.linspace(-_TRAVEL / 2, _TRAVEL / 2, num_frames)):
        center_x, center_y = width * (0.5 + step_x * way), height * (0.5 + step_y * way)
        distance = _distance(scene.shape, x - center_x, y - center_y, radius * min(height, width))
        # An edge one pixel wide: a pixel is covered by half where the outline crosses its middle.
        covered = np.clip(0.5 - distance, 0, 1)[..., None]
        frames[frame] = (background + (colour - background) * covered).clip(0, 255).round()
    return frames


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the outline of a shape about the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.9
    # Three half-planes at 120 degrees; y points down, so that the tip is above.
    sides = [(np.sin(angle), np.cos(angle)) for angle in np.deg2rad([0.0, 120.0, 240.0])]
    return np.max([x * normal_x + y * normal_y for normal_x, normal_y in sides], axis=0) - radius * 0.55
