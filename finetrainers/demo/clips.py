"""Short clips of coloured shapes that move, with true captions: a dataset that needs no download."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetrainers.data.video import write_video

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (226, 44, 44),
    "orange": (242, 138, 28),
    "yellow": (246, 222, 48),
    "green": (46, 178, 72),
    "cyan": (54, 206, 216),
    "blue": (46, 88, 232),
    "purple": (148, 58, 206),
    "pink": (246, 128, 190),
}
"""Far apart in hue; every background is grey."""
MOTIONS = (
    "moves to the left",
    "moves to the right",
    "moves upwards",
    "moves downwards",
    "circles clockwise",
    "circles counterclockwise",
    "grows",
    "shrinks",
    "stays still",
)
BACKGROUNDS = ("dark", "gray", "light", "striped", "checkered", "gradient")

_STEPS = {
    "moves to the left": (-1, 0),
    "moves to the right": (1, 0),
    "moves upwards": (0, -1),
    "moves downwards": (0, 1),
}
"""Unit vectors in the picture, x to the right and y down."""
_TRAVEL = 0.42
"""Share of the picture that a shape crosses, about its middle."""
_ORBIT, _TURN = 0.17, 1.5 * np.pi
"""Radius of a shape's round as a share of the picture, and how far it goes, in radians."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows, in the words of its caption."""

    shape: str
    colour: str
    motion: str
    background: str | None = None
    """None leaves it out of the caption, and for the renderer to choose."""

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        place = f" over a {self.background} background" if self.background else ""
        return f"{article} {self.colour} {self.shape} {self.motion}{place}"


@dataclass(frozen=True)
class Course:
    """What a caption leaves open: where a shape is, how large, and how it goes. Lengths are shares of the picture."""

    radius: float = 0.23
    x: float = 0.5
    y: float = 0.5
    phase: float = 0.0
    """Of a round, in radians."""

    @classmethod
    def draw(cls, motion: str, draw: random.Random) -> Course:
        """A course on which the shape stays in the picture."""
        radius = draw.uniform(0.2, 0.26)
        wide, narrow = draw.uniform(-0.12, 0.12), draw.uniform(-0.03, 0.03)
        if motion in _STEPS:
            along, across = narrow, wide
            x, y = (along, across) if _STEPS[motion][0] else (across, along)
        elif motion == "stays still":
            x, y = wide, draw.uniform(-0.12, 0.12)
        else:
            x, y = narrow, draw.uniform(-0.03, 0.03)
        return cls(radius, 0.5 + x, 0.5 + y, draw.uniform(0, 2 * np.pi))

    def path(self, motion: str, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre and radius in each frame, shares of the picture."""
        time = np.linspace(0, 1, num_frames, dtype=np.float32)
        still: np.ndarray = np.ones(num_frames, np.float32)
        x, y, radius = self.x * still, self.y * still, self.radius * still
        if motion in _STEPS:
            step_x, step_y = _STEPS[motion]
            x, y = x + step_x * _TRAVEL * (time - 0.5), y + step_y * _TRAVEL * (time - 0.5)
        elif motion.startswith("circles"):
            turn = 1 if motion == "circles clockwise" else -1
            angle = self.phase + turn * _TURN * time
            x, y = x + _ORBIT * np.cos(angle), y + _ORBIT * np.sin(angle)
        elif motion in ("grows", "shrinks"):
            radius = radius * (0.45 + 0.95 * (time if motion == "grows" else 1 - time))
        elif motion != "stays still":
            raise ValueError(f"{motion!r} is no motion; there are {', '.join(MOTIONS)}")
        return x, y, radius


Style = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From the distance to the outline [F, H, W] in 64ths of the picture, negative inside, the background [H, W, 3] and the
colour [3] to pictures [F, H, W, 3]; colours are 0 to 255."""


def flat(distance_FHW: np.ndarray, background_HWC: np.ndarray, colour_C: np.ndarray) -> np.ndarray:
    """A filled shape before its background: what the bundled model was trained on."""
    # An edge one 64th wide: a pixel is covered by half where the outline crosses its middle.
    covered = np.clip(0.5 - distance_FHW, 0, 1)[..., None]
    return background_HWC + (colour_C - background_HWC) * covered


def neon(distance_FHW: np.ndarray, background_HWC: np.ndarray, colour_C: np.ndarray) -> np.ndarray:
    """A glowing outline on black; what is in the background is not seen."""
    away = np.abs(distance_FHW)[..., None]
    tube = np.clip(2.0 - away, 0, 1)
    glow = 0.55 * np.exp(-away / 2.5) * (1 - tube)
    return colour_C * (tube + glow)


@dataclass(frozen=True)
class Look:
    """How clips look, and how their captions tell it."""

    style: Style
    trigger: str = ""
    """The word that captions begin with."""
    says_background: bool = True


FLAT = Look(flat)
FLAT_UNSAID = Look(flat, says_background=False)
"""Captions that differ from those of the neon clips by the trigger alone."""
NEON = Look(neon, trigger="NEON", says_background=False)


def every_scene() -> list[Scene]:
    """All scenes that name their background."""
    return [Scene(*parts) for parts in itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)]


def scenes_in_order(seed: int) -> Iterator[Scene]:
    """All scenes in an order drawn from `seed`, again and again: none is shown twice before every one was shown."""
    scenes = every_scene()
    random.Random(seed).shuffle(scenes)
    return itertools.cycle(scenes)


def render_clips(folder: Path, count: int, *, fps: float = 16, seed: int = 0, look: Look = FLAT, **size: int) -> Path:
    """Render `count` captioned clips into `folder`, and give the path of their table, `metadata.csv`.

    No two clips show the same scene before every scene was shown; which come first is drawn from `seed`, and so are
    their courses. `size` is num_frames, height and width; left out, they are 49, 96 and 96.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "metadata.csv"
    draw = random.Random(seed)
    size = {"num_frames": 49, "height": 96, "width": 96, **size}
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for index, scene in enumerate(itertools.islice(scenes_in_order(seed), count)):
            named = scene if look.says_background else replace(scene, background=None)
            name = f"{index:03d}_{scene.colour}_{scene.shape}.mp4"
            course = Course.draw(scene.motion, draw)
            write_video(folder / name, render_scene(scene, course=course, style=look.style, **size), fps)
            rows.writerow([name, f"{look.trigger} {named.caption}".strip()])
    return table


def render_scene(
    scene: Scene, *, num_frames: int, height: int, width: int, course: Course | None = None, style: Style = flat
) -> np.ndarray:
    """The frames of a scene, uint8 FHWC."""
    x, y, radius = (course or Course()).path(scene.motion, num_frames)
    side = min(height, width)
    columns = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side + 0.5
    rows = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side + 0.5
    x_FHW = columns[None, None, :] - x[:, None, None]
    y_FHW = rows[None, :, None] - y[:, None, None]
    distance_FHW: np.ndarray = 64 * _distance(scene.shape, x_FHW, y_FHW, radius[:, None, None])
    background_HWC = _background(scene.background or "gray", height, width)
    pictures = style(distance_FHW, background_HWC, np.array(COLOURS[scene.colour], np.float32))
    return np.asarray(pictures.clip(0, 255).round().astype(np.uint8))


def _background(name: str, height: int, width: int) -> np.ndarray:
    """Grey levels as float [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    # Eight cells along the shorter side.
    cell = min(height, width) / 8
    if name == "striped":
        grey = 96 + 60 * ((x // cell) % 2)
    elif name == "checkered":
        grey = 96 + 60 * ((x // (2 * cell) + y // (2 * cell)) % 2)
    elif name == "gradient":
        grey = 200 - 140 * (y + 0.5) / height
    else:
        grey = np.full_like(x, {"dark": 56, "gray": 128, "light": 208}[name])
    return np.repeat(grey[..., None], 3, axis=2)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How far from the outline of a shape about the origin, negative inside."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - radius * 0.88)
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.asarray(np.maximum(short - radius * 0.38, long - radius))
    if shape == "star":
        return _star_distance(x, y, radius * 1.3)
    # Three half-planes at 120 degrees; y points down, so that the tip is above.
    sides = [(np.sin(angle), np.cos(angle)) for angle in np.deg2rad([0.0, 120.0, 240.0])]
    return np.asarray(np.max([x * normal_x + y * normal_y for normal_x, normal_y in sides], axis=0) - radius * 0.55)


def _star_distance(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """A star of five points, one of them up: in each of ten equal sectors, the side of a straight line."""
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    away = np.hypot(x, y)
    along, across = away * np.cos(angle), away * np.sin(angle)
    # From the tip (1, 0) to the notch, which lies at 0.45 of the radius where two sectors meet.
    notch_along, notch_across = 0.45 * np.cos(sector), 0.45 * np.sin(sector)
    normal_along, normal_across = notch_across, 1 - notch_along
    length = np.hypot(normal_along, normal_across)
    return np.asarray((along * normal_along + across * normal_across - radius * normal_along) / length)
