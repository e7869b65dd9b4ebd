"""What a rendered or generated clip shows, by simple measures of its pixels: colour, shape, motion, and the style."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from finetrainers.demo.clips import COLOURS, SHAPES, Course, Scene, render_scene

# Shape suffixes: F frames, H height, W width, C channels.

_COLOURED = 70
"""Least difference between a pixel's strongest and weakest channel that is no grey, of 255."""
_DARK = 40
"""Strongest channel of a pixel that counts as black, of 255."""
_TRAVELS = 0.2
"""Share of the picture that a shape must cross to be moving."""
_GROWS = 1.5
"""Factor of its area by which a shape must change to be growing."""


def recognise(video_FHWC: np.ndarray) -> Scene | None:
    """The scene of one coloured shape before a grey background, uint8; None where there is no coloured pixel in the
    first, the middle or the last frame."""
    colour_FHW = np.ptp(video_FHWC.astype(np.int16), axis=3).astype(np.float32)
    mask_FHW = colour_FHW > _COLOURED
    num_frames = len(video_FHWC)
    if not all(mask_FHW[frame].any() for frame in (0, num_frames // 2, num_frames - 1)):
        return None
    return Scene(_shape(mask_FHW), _colour(video_FHWC, colour_FHW), _motion(mask_FHW))


def style_of(video_FHWC: np.ndarray) -> dict[str, float]:
    """Two statistics in which the neon style differs from the flat one: `black`, the share of black pixels, and
    `hollow`, the share of pixels without colour in the middle of the shape, three by three of each frame."""
    black = (video_FHWC.max(axis=3) < _DARK).mean()
    hollow = []
    for mask_HW in np.ptp(video_FHWC.astype(np.int16), axis=3) > _COLOURED:
        if mask_HW.any():
            row, column = np.argwhere(mask_HW).mean(0).round().astype(int).clip(1, None)
            hollow.append(1 - mask_HW[row - 1 : row + 2, column - 1 : column + 2].mean())
    return {"black": float(black), "hollow": float(np.mean(hollow)) if hollow else 0.0}


def share_of_way(
    start: Sequence[np.ndarray], reached: Sequence[np.ndarray], target: Sequence[np.ndarray]
) -> dict[str, float]:
    """For each statistic of the style, where the mean over `reached` lies between those over `start` (0) and `target`
    (1)."""
    means = [
        {name: float(np.mean([style[name] for style in styles])) for name in styles[0]}
        for styles in ([style_of(video) for video in videos] for videos in (start, reached, target))
    ]
    first, now, last = means
    return {name: (now[name] - first[name]) / (last[name] - first[name]) for name in first}


def _colour(video_FHWC: np.ndarray, colour_FHW: np.ndarray) -> str:
    """The nearest hue of the most strongly coloured pixels."""
    strong = colour_FHW >= 0.8 * np.quantile(colour_FHW[colour_FHW > _COLOURED], 0.9)
    hue = colorsys.rgb_to_hsv(*(video_FHWC[strong].mean(axis=0) / 255))[0]
    hues = {name: colorsys.rgb_to_hsv(*(np.array(rgb) / 255))[0] for name, rgb in COLOURS.items()}
    return min(hues, key=lambda name: abs((hues[name] - hue + 0.5) % 1 - 0.5))


def _motion(mask_FHW: np.ndarray) -> str:
    """By the path of the centre, and by the area where it stays."""
    frames = [frame for frame in range(len(mask_FHW)) if mask_FHW[frame].any()]
    centers = np.array([np.argwhere(mask_FHW[frame]).mean(0) for frame in frames]) / mask_FHW.shape[1]
    rows, columns = centers.T
    extent: float = max(np.ptp(rows), np.ptp(columns))
    middle_row, middle_column = (np.ptp(axis) / 2 + axis.min() for axis in (rows, columns))
    angles = np.unwrap(np.arctan2(rows - middle_row, columns - middle_column))
    if min(np.ptp(rows), np.ptp(columns)) > _TRAVELS and abs(angles[-1] - angles[0]) > np.pi:
        return "circles clockwise" if angles[-1] > angles[0] else "circles counterclockwise"
    if extent > _TRAVELS:
        down, right = centers[-2:].mean(0) - centers[:2].mean(0)
        if abs(right) > abs(down):
            return "moves to the right" if right > 0 else "moves to the left"
        return "moves downwards" if down > 0 else "moves upwards"
    areas = mask_FHW.sum((1, 2)).astype(np.float64)
    change = areas[-3:].mean() / max(areas[:3].mean(), 1.0)
    return "grows" if change > _GROWS else "shrinks" if change < 1 / _GROWS else "stays still"


def _shape(mask_FHW: np.ndarray) -> str:
    """The shape that covers the same pixels best when it is drawn as large and in the same place, over all frames."""
    agreement = {name: np.mean([_overlap(mask_HW, name) for mask_HW in mask_FHW[::4]]) for name in SHAPES}
    return max(agreement, key=lambda name: agreement[name])


def _overlap(mask_HW: np.ndarray, shape: str) -> float:
    """Intersection over union of a mask and a shape of its area about its centre."""
    if not mask_HW.any():
        return 0.0
    height, width = mask_HW.shape
    size = {"num_frames": 1, "height": height, "width": width}
    row, column = np.argwhere(mask_HW).mean(0) + 0.5

    def draw(radius: float, x: float, y: float) -> np.ndarray:
        frames = render_scene(Scene(shape, "red", "stays still"), course=Course(radius, x, y), **size)
        return np.ptp(frames[0].astype(np.int16), axis=2) > _COLOURED

    # Areas go with the square of the radius. A shape's centre of mass need not be the point that it is drawn about.
    trial = draw(0.3, 0.5, 0.5)
    radius = 0.3 * np.sqrt(mask_HW.sum() / trial.sum())
    trial_row, trial_column = np.argwhere(trial).mean(0) + 0.5 - np.array([height, width]) / 2
    scale = radius / 0.3
    drawn = draw(radius, (column - trial_column * scale) / width, (row - trial_row * scale) / height)
    return float((mask_HW & drawn).sum() / (mask_HW | drawn).sum())
