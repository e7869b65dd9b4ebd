"""One picture of a demo: the same prompts before and after training, beside what was to be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetrainers.data.video import probe, read_window, write_video
from finetrainers.types import Window

# Shape suffixes: F frames, H height, W width, C channels.

_SCALE = 2
_GAP, _HEAD, _LINE = 8, 22, 18
"""Pixels between videos, above the columns, and under each row for its prompt."""
_PAPER, _INK = (246, 247, 249), (27, 31, 39)


def read_video(path: Path) -> np.ndarray:
    """All frames of an mp4, uint8 FHWC."""
    media = probe(path)
    window = Window(0.0, media.num_frames, media.fps)
    video_FCHW = read_window(path, media, window, height=media.height, width=media.width)
    return np.ascontiguousarray(video_FCHW.permute(0, 2, 3, 1).numpy())


def write_comparison(
    folder: Path, columns: Mapping[str, Sequence[np.ndarray]], rows: Sequence[str], *, fps: float
) -> tuple[Path, Path]:
    """Write `comparison.mp4` and `comparison.gif` into `folder`: a column for each name, a row for each prompt, whose
    videos are uint8 FHWC and of one size. Gives their paths."""
    sheets_FHWC = _sheets(columns, rows)
    movie, picture = folder / "comparison.mp4", folder / "comparison.gif"
    write_video(movie, sheets_FHWC, fps)
    pages = [Image.fromarray(sheet).convert("P", palette=Image.Palette.ADAPTIVE) for sheet in sheets_FHWC]
    pages[0].save(picture, save_all=True, append_images=pages[1:], duration=round(1000 / fps), loop=0)
    return movie, picture


def _sheets(columns: Mapping[str, Sequence[np.ndarray]], rows: Sequence[str]) -> np.ndarray:
    """The frames of the whole picture, FHWC."""
    num_frames, height, width, _ = next(iter(columns.values()))[0].shape
    height, width = height * _SCALE, width * _SCALE
    step_x, step_y = width + _GAP, height + _LINE + _GAP
    paper = Image.new("RGB", (_GAP + step_x * len(columns), _HEAD + step_y * len(rows)), _PAPER)
    draw = ImageDraw.Draw(paper)
    for column, name in enumerate(columns):
        draw.text((_GAP + column * step_x, 4), name, _INK, ImageFont.load_default(13))
    for row, prompt in enumerate(rows):
        draw.text((_GAP, _HEAD + row * step_y + height + 2), prompt, _INK, ImageFont.load_default(12))
    sheets_FHWC = np.repeat(np.asarray(paper)[None], num_frames, axis=0)
    for column, videos in enumerate(columns.values()):
        for row, video_FHWC in enumerate(videos):
            top, left = _HEAD + row * step_y, _GAP + column * step_x
            large = video_FHWC.repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
            sheets_FHWC[:, top : top + height, left : left + width] = large
    return sheets_FHWC
