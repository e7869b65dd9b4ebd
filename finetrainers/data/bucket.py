"""Which size a clip is brought to, and which parts of it are used: plain numbers, no pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from finetrainers.errors import UnusableClip
from finetrainers.types import Bucket, Media, Window

_SLACK = 0.1
"""Share of a frame that the end of a clip must last to count as one more frame: containers round times to a tick (a
millisecond in mkv), so a shorter remainder may be no frame at all."""


def choose_bucket(media: Media, buckets: Sequence[Bucket], fps: float | None) -> Bucket:
    """The bucket that shows most of the clip: nearest in shape, then longest, then largest without enlarging.

    A video becomes a still only where all buckets are stills, and an image never becomes a video. Raises UnusableClip
    when the clip is too short for every bucket.
    """
    if media.is_image:
        candidates = [bucket for bucket in buckets if bucket.num_frames == 1]
        if not candidates:
            raise UnusableClip(
                f"is an image, and no bucket is for images; add one of 1 frame, such as {_as_still(buckets)}"
            )
    else:
        moving = [bucket for bucket in buckets if bucket.num_frames > 1] or list(buckets)
        rate = fps or media.fps
        num_frames = _num_frames_at(media, rate)
        candidates = [bucket for bucket in moving if bucket.num_frames <= num_frames]
        if not candidates:
            shortest = min(moving)
            raise UnusableClip(
                f"is too short: {num_frames} frame{'s' * (num_frames != 1)} at {rate:g} fps, but the shortest bucket, "
                f"{shortest}, needs {shortest.num_frames}"
            )
    return min(candidates, key=lambda bucket: _distance(media, bucket))


def choose_windows(
    media: Media, bucket: Bucket, fps: float | None, policy: Literal["first", "middle", "all"]
) -> list[Window]:
    """The parts of the clip that become samples of `bucket`: the `first`, the `middle`, or `all` that fit, end to end.

    `bucket` is one that `choose_bucket` gave for the same clip and `fps`.
    """
    if media.is_image:
        return [Window(start_seconds=0.0, num_frames=1, fps=0.0)]
    rate = fps or media.fps
    spare = _num_frames_at(media, rate) - bucket.num_frames
    assert spare >= 0, f"{bucket} does not fit into {media}"
    if policy == "all":
        starts = range(0, spare + 1, bucket.num_frames)
    else:
        starts = range(spare // 2, spare // 2 + 1) if policy == "middle" else range(1)
    return [Window(start_seconds=start / rate, num_frames=bucket.num_frames, fps=rate) for start in starts]


def cover(width: int, height: int, *, bucket_width: int, bucket_height: int) -> tuple[int, int]:
    """The size, width first, to which a picture is scaled so that it just covers the bucket; the rest is cropped."""
    scale = max(bucket_width / width, bucket_height / height)
    return max(bucket_width, round(width * scale)), max(bucket_height, round(height * scale))


def _num_frames_at(media: Media, fps: float) -> int:
    """How many frames the clip gives when one is taken every 1 / fps seconds; the last one may hold to the end."""
    return max(1, math.ceil(media.duration_seconds * fps - _SLACK))


def _distance(media: Media, bucket: Bucket) -> tuple[float, int, bool, int, Bucket]:
    shape = abs(math.log((media.width / media.height) / (bucket.width / bucket.height)))
    area = bucket.width * bucket.height
    enlarges = bucket.width > media.width or bucket.height > media.height
    return round(shape, 9), -bucket.num_frames, enlarges, area if enlarges else -area, bucket


def _as_still(buckets: Sequence[Bucket]) -> Bucket:
    return Bucket(1, buckets[0].height, buckets[0].width)
