"""Each clip goes to the bucket that shows most of it, and its windows never ask for a frame that is not there."""

import math
import random
import re

import pytest

from finetrainers.data.bucket import choose_bucket, choose_windows, cover
from finetrainers.errors import UnusableClip
from finetrainers.types import Bucket, Media, Window


def video(num_frames: int, height: int, width: int, fps: float = 25.0) -> Media:
    return Media(width=width, height=height, num_frames=num_frames, fps=fps, duration_seconds=num_frames / fps)


def image(height: int, width: int) -> Media:
    return Media(width=width, height=height, num_frames=1, fps=0.0, duration_seconds=0.0)


def parse(buckets: str) -> list[Bucket]:
    return [Bucket.parse(bucket) for bucket in buckets.split()]


@pytest.mark.parametrize(
    ("media", "buckets", "fps", "chosen"),
    [
        pytest.param(video(60, 480, 720), "49x512x768 49x512x512", None, "49x512x768", id="nearest shape"),
        pytest.param(video(60, 720, 480), "49x512x768 49x768x512", None, "49x768x512", id="portrait"),
        pytest.param(
            video(60, 480, 720), "17x512x512 49x512x768 97x512x768", None, "49x512x768", id="longest that fits"
        ),
        pytest.param(video(60, 480, 720), "97x512x768 49x512x512", None, "49x512x512", id="fitting before shape"),
        pytest.param(video(60, 480, 720), "49x512x512 17x512x768", None, "17x512x768", id="shape before length"),
        pytest.param(video(60, 512, 768), "17x256x384 17x512x768 17x1024x1536", None, "17x512x768", id="largest as is"),
        pytest.param(video(60, 100, 150), "17x512x768 17x256x384", None, "17x256x384", id="least enlarged"),
        pytest.param(
            video(60, 512, 768, 30.0), "49x512x768 17x512x768", 15.0, "17x512x768", id="fewer at a lower rate"
        ),
        pytest.param(video(60, 512, 768, 30.0), "97x512x768 17x512x768", 60.0, "97x512x768", id="more at a higher one"),
        pytest.param(video(60, 512, 768), "1x512x768 49x256x256", None, "49x256x256", id="a video is no still"),
        pytest.param(video(60, 512, 768), "1x512x512 1x512x768", None, "1x512x768", id="unless all are stills"),
        pytest.param(image(512, 768), "49x512x768 1x256x256", None, "1x256x256", id="an image is a still"),
        pytest.param(video(49, 512, 768, 8.0), "49x512x768", None, "49x512x768", id="just long enough"),
        pytest.param(video(1, 512, 768), "1x512x768", None, "1x512x768", id="a video of one frame"),
    ],
)
def test_choose_bucket(media: Media, buckets: str, fps: float | None, chosen: str) -> None:
    assert str(choose_bucket(media, parse(buckets), fps)) == chosen
    assert str(choose_bucket(media, parse(buckets)[::-1], fps)) == chosen


@pytest.mark.parametrize(
    ("media", "buckets", "fps", "words"),
    [
        (video(16, 64, 64), "49x64x64 17x64x64", None, "16 frames at 25 fps.* 17x64x64, needs 17"),
        (video(60, 64, 64, 30.0), "49x64x64 1x64x64", 8.0, "16 frames at 8 fps.* 49x64x64, needs 49"),
        (video(1, 64, 64), "9x64x64", None, "1 frame at 25 fps"),
        (image(64, 96), "9x64x64", None, "is an image.* 1x64x64"),
    ],
)
def test_a_clip_that_fits_no_bucket_is_told_why(media: Media, buckets: str, fps: float | None, words: str) -> None:
    with pytest.raises(UnusableClip) as caught:
        choose_bucket(media, parse(buckets), fps)
    assert re.search(words, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("policy", "num_frames", "starts"),
    [
        ("first", 100, [0]),
        ("middle", 100, [41]),
        ("middle", 17, [0]),
        ("all", 17, [0]),
        ("all", 33, [0]),
        ("all", 34, [0, 17]),
        ("all", 100, [0, 17, 34, 51, 68]),
    ],
)
def test_choose_windows(policy, num_frames: int, starts: list[int]) -> None:
    windows = choose_windows(video(num_frames, 64, 64, 25.0), Bucket(17, 64, 64), None, policy)
    assert windows == [Window(start / 25.0, 17, 25.0) for start in starts]


def test_an_image_has_one_window() -> None:
    assert choose_windows(image(64, 64), Bucket(1, 64, 64), 24.0, "all") == [Window(0.0, 1, 0.0)]


def test_windows_stay_inside_the_clip() -> None:
    """Every frame asked for begins before the clip ends, whatever the rates; and none that would fit is left out."""
    draw = random.Random(0)
    rates = [8.0, 12.5, 16.0, 23.976, 24000 / 1001, 24.0, 25.0, 29.97, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 120.0]
    for _ in range(5000):
        own, wanted, num_frames = draw.choice(rates), draw.choice([None, *rates]), draw.randint(1, 400)
        clip, rate = video(num_frames, 64, 64, own), wanted or own
        bucket = Bucket(draw.randint(1, 60), 64, 64)
        begun = math.ceil(round(clip.duration_seconds * rate, 6))  # frames that begin before the end
        try:
            windows = choose_windows(clip, choose_bucket(clip, [bucket], wanted), wanted, "all")
        except UnusableClip:
            assert begun < bucket.num_frames or begun - clip.duration_seconds * rate > 0.9
            continue
        last = windows[-1].start_seconds + (bucket.num_frames - 1) / rate
        assert last < clip.duration_seconds
        assert wanted is not None or len(windows) == num_frames // bucket.num_frames


@pytest.mark.parametrize("size", [(1920, 1080), (720, 1280), (1, 1), (853, 480), (512, 768), (7, 9999)])
def test_cover_covers(size: tuple[int, int]) -> None:
    width, height = cover(*size, bucket_width=768, bucket_height=512)
    assert width >= 768 and height >= 512 and (width == 768 or height == 512)
    scale = max(768 / size[0], 512 / size[1])
    assert abs(width - size[0] * scale) <= 0.5 and abs(height - size[1] * scale) <= 0.5
