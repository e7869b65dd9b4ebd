"""A clip is the pixels of its window, whether it comes from a video or an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetrainers.data.bucket import choose_bucket, choose_windows
from finetrainers.data.clip import read_clip
from finetrainers.data.video import probe
from finetrainers.errors import UnusableClip
from finetrainers.types import Bucket, Record
from tests.data.coded import read_codes, write_coded


def test_windows_of_a_video(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.mp4", num_frames=40)
    media, bucket = probe(path), Bucket(9, 48, 80)
    windows = choose_windows(media, bucket, None, "all")
    clips = [read_clip(Record("a.mp4", path, ""), media, window, bucket) for window in windows]
    assert [clip.fps for clip in clips] == [25.0] * 4
    assert all(clip.video_FCHW.shape == (9, 3, 48, 80) and clip.video_FCHW.dtype == torch.uint8 for clip in clips)
    assert [number for clip in clips for number in read_codes(clip.video_FCHW)] == list(range(36))


def test_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.full((50, 90, 3), (10, 120, 240), np.uint8)).save(path, quality=100)
    media, buckets = probe(path), [Bucket(9, 64, 64), Bucket(1, 32, 64)]
    bucket = choose_bucket(media, buckets, 24.0)
    (window,) = choose_windows(media, bucket, 24.0, "all")
    clip = read_clip(Record("a.jpg", path, ""), media, window, bucket)
    assert clip.fps == 0.0 and clip.video_FCHW.shape == (1, 3, 32, 64)
    assert clip.video_FCHW.float().mean((0, 2, 3)).tolist() == pytest.approx([10, 120, 240], abs=2)


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_file_that_goes_after_it_was_looked_at_has_a_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.mp4":
        write_coded(path)
    else:
        Image.new("RGB", (64, 64)).save(path)
    media, bucket = probe(path), Bucket(1, 32, 32)
    (window,) = choose_windows(media, bucket, None, "first")
    path.unlink()
    with pytest.raises(UnusableClip, match="cannot be read"):
        read_clip(Record(name, path, ""), media, window, bucket)
