"""Images as a viewer shows them, cropped to their bucket; whatever is no image has a reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetrainers.data.image import probe_image, read_image
from finetrainers.errors import UnusableClip

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = ((RED, GREEN), (BLUE, WHITE))


def four_corners(height: int, width: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    for row, colours in enumerate(CORNERS):
        for column, colour in enumerate(colours):
            pixels[row * height // 2 : (row + 1) * height // 2, column * width // 2 : (column + 1) * width // 2] = (
                colour
            )
    return Image.fromarray(pixels)


# How a camera stores an upright picture under each EXIF orientation: the inverse of what a viewer does.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.png"
    stored = (
        four_corners(64, 96) if STORED[orientation] is None else four_corners(64, 96).transpose(STORED[orientation])
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    media = probe_image(path)
    assert (media.width, media.height, media.num_frames, media.is_image) == (96, 64, 1, True)
    pixels = read_image(path, height=64, width=96)
    assert pixels.shape == (1, 3, 64, 96)
    found = tuple(tuple(tuple(pixels[0, :, row, column].tolist()) for column in (10, 86)) for row in (10, 54))
    assert found == CORNERS


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(32, 32), (90, 40), (300, 500), (1, 1)])
def test_every_mode_becomes_rgb_of_the_bucket(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / "a.tiff"
    Image.new(mode, size).save(path)
    pixels = read_image(path, height=48, width=64)
    assert pixels.shape == (1, 3, 48, 64) and pixels.is_contiguous()


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(path)
    assert read_image(path, height=32, width=32).unique().tolist() == [255]


def test_the_middle_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    assert read_image(path, height=40, width=40).unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "huge"])
def test_what_is_no_image_has_a_reason(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    four_corners(64, 64).save(path)
    whole = path.read_bytes()
    huge = whole[:16] + b"\x00\x01\x00\x00" * 2 + whole[24:]  # the header of a picture of 65536 x 65536
    path.write_bytes({"empty": b"", "text": b"<html>", "cut": whole[: len(whole) // 2], "huge": huge}[kind])
    with pytest.raises(UnusableClip, match="cannot be read as an image"):
        probe_image(path)
        read_image(path, height=32, width=32)
