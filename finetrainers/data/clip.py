"""The pixels of one window of a video or image, at the size of its bucket."""

from __future__ import annotations

from finetrainers.data.image import read_image
from finetrainers.data.video import read_window
from finetrainers.types import Bucket, Clip, Media, Record, Window


def read_clip(record: Record, media: Media, window: Window, bucket: Bucket) -> Clip:
    """Read what `choose_windows` picked. Raises UnusableClip when the file does not hold what its header promised."""
    if media.is_image:
        video_FCHW = read_image(record.path, height=bucket.height, width=bucket.width)
    else:
        video_FCHW = read_window(record.path, media, window, height=bucket.height, width=bucket.width)
    return Clip(video_FCHW=video_FCHW, fps=window.fps)
