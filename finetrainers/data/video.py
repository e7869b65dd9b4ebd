"""Videos: what a header says, the frames of a window as a viewer sees them, and writing mp4."""

from __future__ import annotations

import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from finetrainers.data.bucket import cover
from finetrainers.data.container import (
    ShownFrame,
    check_file,
    frame_seconds,
    frames_from,
    is_mp4,
    is_timed,
    is_track_turned,
    open_container,
    packets_of,
    picture_stream,
    pixel_aspect,
    seconds_of,
    tick_seconds,
    turn_of,
)
from finetrainers.data.image import probe_image
from finetrainers.data.source import IMAGE_EXTENSIONS
from finetrainers.errors import UnusableClip
from finetrainers.types import Media, Window

_LARGEST_PIXELS = 2**27
"""A header may claim any size, and a decoder takes the memory for it; this is 16k x 8k."""
_NUM_THREADS = 2
_FLOAT_NOISE = 1e-6
"""Seconds by which sums of times may be off; far below any tick."""
_USUAL_FPS = 25.0
"""Of a file that tells neither its rate nor when its frames are shown."""
_ACCURATE_RND = 0x40000
"""swscale's SWS_ACCURATE_RND, which PyAV names from 18 on."""
_SCALING = Interpolation.BICUBIC.value | _ACCURATE_RND
"""Antialiased when it reduces, and the same filter that images go through."""
_BT709, _BT601 = 1, 5
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
"""From the matrix that a frame names (ITU-T H.273) to swscale's number for it; PyAV names all of them from 18 on."""


def probe(path: Path) -> Media:
    """What the header of a video or image says, as a viewer sees it; frames are counted where the header does not.

    Raises UnusableClip, with the reason, for whatever is no video or image.
    """
    check_file(path)
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        return probe_image(path)
    media = _media_from_mp4_header(path) if is_mp4(path) else None
    if media is None:
        with open_container(path) as container:
            media = _media_from_packets(container)
    if media.width * media.height > _LARGEST_PIXELS or media.num_frames > path.stat().st_size:
        claim = f"{media.num_frames} frames of {media.width}x{media.height}"
        raise UnusableClip(f"its header claims {claim}, which it cannot hold; it is damaged")
    return media


def read_window(path: Path, media: Media, window: Window, *, height: int, width: int) -> Tensor:
    """The frames on screen at `start + k / fps`, uint8 RGB, FCHW: scaled to cover height x width, its middle cut out.

    Memory is bounded by the frames of the window, whatever the length of the clip. Raises UnusableClip when the file
    ends before the window is full.
    """
    pixels_FCHW: np.ndarray = np.empty((window.num_frames, 3, height, width), np.uint8)
    moments = [window.start_seconds + frame / window.fps for frame in range(window.num_frames)]
    row = 0
    with open_container(path) as container:
        stream = picture_stream(container)
        stream.thread_type, stream.codec_context.thread_count = "AUTO", _NUM_THREADS
        # A timestamp is a time rounded to a tick, so that a frame may be due half a tick before it.
        tolerance = min(tick_seconds(stream) / 2, 0.25 / media.fps)
        painter = _Painter(pixel_aspect(stream))
        frames = frames_from(container, stream, moments[0], fps=media.fps)
        held = next(frames, None)
        while held and row < window.num_frames:
            following = next(frames, None) if held.seconds <= moments[-1] - tolerance else None
            end = following.seconds - tolerance if following else held.end_seconds - _FLOAT_NOISE
            while row < window.num_frames and moments[row] < end:
                painter.paint(held, pixels_FCHW[row])
                row += 1
            held = following
    if row < window.num_frames:
        wanted = f"{window.num_frames} frames wanted from {window.start_seconds:.2f} s on"
        raise UnusableClip(f"is cut short: only {row} of the {wanted} are there")
    return torch.from_numpy(pixels_FCHW)


def write_video(path: Path, video_FHWC: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames as an mp4 that browsers play (H.264, 4:2:0), whole or not at all.

    An odd side grows by one pixel, a copy of the edge, since 4:2:0 goes in pairs.
    """
    num_frames, height, width, _ = video_FHWC.shape
    padded_FHWC = np.pad(video_FHWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            codec = "libx264" if "libx264" in av.codecs_available else container.default_video_codec
            # With mbtree, x264 gives another file for the same frames now and then.
            options = {"crf": "18", "mbtree": "0"}
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.pix_fmt, stream.height, stream.width = "yuv420p", height + height % 2, width + width % 2
            stream.codec_context.colorspace, stream.codec_context.color_range = _BT709, ColorRange.MPEG
            reformatter = VideoReformatter()
            for index in range(num_frames):
                picture = VideoFrame.from_ndarray(np.ascontiguousarray(padded_FHWC[index]), format="rgb24")
                frame = reformatter.reformat(
                    picture,
                    format="yuv420p",
                    dst_colorspace=_BT709,
                    src_color_range=ColorRange.JPEG,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_SCALING,
                )
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Painter:
    """Scales, crops and turns decoded frames into their place; a frame that is shown for long is converted once."""

    def __init__(self, pixel_aspect: float) -> None:
        self._pixel_aspect = pixel_aspect
        self._reformatter = VideoReformatter()
        self._last: tuple[ShownFrame, np.ndarray] | None = None

    def paint(self, shown: ShownFrame, pixels_CHW: np.ndarray) -> None:
        if self._last and self._last[0] is shown:
            pixels_CHW[:] = self._last[1]
            return
        frame = shown.frame
        if frame.is_corrupt:
            raise UnusableClip(f"is damaged: the frame at {shown.seconds:.2f} s is not whole")
        turn = turn_of(frame)
        height, width = pixels_CHW.shape[1:]
        if turn.is_transposed:
            height, width = width, height
        seen_width = max(1, round(frame.width * self._pixel_aspect))
        scaled_width, scaled_height = cover(seen_width, frame.height, bucket_width=width, bucket_height=height)
        left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
        # Planes rather than rgb24: swscale is quicker, keeps colour at full width, and channels come first.
        scaled = self._reformatter.reformat(
            frame,
            scaled_width,
            scaled_height,
            format="gbrp",
            src_colorspace=_matrix(frame),
            dst_colorspace=_matrix(frame),
            src_color_range=_color_range(frame),
            dst_color_range=ColorRange.JPEG,
            interpolation=_SCALING,
        )
        green, blue, red = scaled.planes
        for channel, plane in zip(pixels_CHW, (red, green, blue), strict=True):
            pixels_HW = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            pixels_HW = pixels_HW[top : top + height, left : left + width]
            if turn.is_transposed:
                pixels_HW = pixels_HW.T
            channel[:] = pixels_HW[:: -1 if turn.flips_rows else 1, :: -1 if turn.flips_columns else 1]
        self._last = shown, pixels_CHW


def _matrix(frame: VideoFrame) -> int:
    """The frame's own; where it names none, BT.709 for HD and BT.601 below it, as players assume."""
    is_hd = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) > 576
    return _MATRICES.get(frame.colorspace, _BT709 if is_hd else _BT601)


def _color_range(frame: VideoFrame) -> ColorRange:
    named = frame.color_range in (ColorRange.MPEG, ColorRange.JPEG)
    if named:
        return ColorRange(frame.color_range)
    return ColorRange.JPEG if frame.format.name.startswith("yuvj") or frame.format.is_rgb else ColorRange.MPEG


def _media_from_mp4_header(path: Path) -> Media | None:
    """None unless the header can be relied on: the rate is steady, and no edit list cuts the clip (which shows as
    numbers that do not agree)."""
    # Opening decodes a few frames to learn what the header says already, and that takes most of the time.
    with open_container(path, format="mov", options={"skip_frame": "all", "threads": "1"}) as container:
        stream = picture_stream(container)
        rate, base_rate, num_frames = stream.average_rate, stream.base_rate, stream.frames
        if not (rate and base_rate and num_frames and stream.duration):
            return None
        seconds = stream.duration * tick_seconds(stream)
        if abs(seconds * rate - num_frames) > 0.5 or abs(base_rate / rate - 1) > 1e-3:
            return None
        is_turned = is_track_turned(path, stream.id)
        return _media(stream, is_turned, num_frames=num_frames, fps=float(rate), seconds=seconds)


def _media_from_packets(container: InputContainer) -> Media:
    """Count the frames and take their times from the packets; one is decoded, to see how it is turned."""
    stream = picture_stream(container)
    rate = float(stream.average_rate or stream.guessed_rate or _USUAL_FPS)
    first, num_frames, last = None, 0, (0.0, 0.0)
    for packet in packets_of(container, stream):
        if packet.size and not packet.is_discard:
            num_frames += 1
            if packet.pts is not None and is_timed(container, stream):
                start = seconds_of(packet, stream)
                last = max(last, (start, start + frame_seconds(packet, rate)))
        if first is None:
            with suppress(av.error.InvalidDataError):
                first = next(iter(packet.decode()), None)
    if first is None:
        raise UnusableClip("has no frame that can be decoded")
    seconds = last[1] or num_frames / rate
    # A rate that is named is exact where times are rounded; one that does not fit what was counted is no steady rate.
    fps = rate if abs(seconds * rate - num_frames) <= 0.5 + 0.02 * num_frames else num_frames / seconds
    return _media(stream, turn_of(first).is_transposed, num_frames=num_frames, fps=fps, seconds=seconds)


def _media(stream: VideoStream, is_turned: bool, *, num_frames: int, fps: float, seconds: float) -> Media:
    width, height = max(1, round(stream.width * pixel_aspect(stream))), stream.height
    if is_turned:
        width, height = height, width
    return Media(width=width, height=height, num_frames=num_frames, fps=fps, duration_seconds=seconds)
