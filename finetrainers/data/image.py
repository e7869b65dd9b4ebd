"""Still images through Pillow: their size, and their pixels brought to a bucket."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetrainers.data.bucket import cover
from finetrainers.errors import UnusableClip
from finetrainers.types import Media

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are the quarter turns


def probe_image(path: Path) -> Media:
    """Size of an image as a viewer shows it (EXIF rotation applied), from its header alone."""
    with _open(path) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
    return Media(width=width, height=height, num_frames=1, fps=0.0, duration_seconds=0.0)


def read_image(path: Path, *, height: int, width: int) -> Tensor:
    """One frame of uint8 RGB, FCHW: scaled to cover height x width, and the middle of it cut out.

    Transparent parts become white, as on a page.
    """
    with _open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            picture = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        size = cover(*upright.size, bucket_width=width, bucket_height=height)
        scaled = upright.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels_HWC = np.asarray(scaled)[top : top + height, left : left + width]
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))[None])


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # Pillow warns of pictures beyond 89 megapixels, and refuses those twice as large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnusableClip(f"cannot be read as an image ({error})") from error
