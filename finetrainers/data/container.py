"""Video files as FFmpeg opens them, through PyAV: which are let in, which stream is the picture, its frames in time."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from finetrainers.errors import UnusableClip

_FORMATS = "asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,webm,yuv4mpegpipe"
"""FFmpeg also reads playlists, which open other files and addresses, and draws text files as pictures: not here."""
_PATIENCE_SECONDS = 30.0
"""Longest wait for the next frame of a file, or for one read from it."""


_LEAD_SECONDS = 10.0
"""How far before the first frame's time the beginning is sought: a frame is stored earlier than it is shown."""
_UNSEEKABLE = ("flv", "mpeg")
"""Decoded from the beginning, since FFmpeg finds neither the way back to it nor, in mpeg, the time of each frame."""


class ShownFrame(NamedTuple):
    """A decoded frame and when it is on screen, in seconds from the start of the stream."""

    frame: VideoFrame
    seconds: float
    end_seconds: float
    """As the file says; the next frame, if there is one, says it better."""


class Turn(NamedTuple):
    """How a decoded picture is brought upright: first its axes are exchanged, then it is mirrored."""

    is_transposed: bool
    flips_rows: bool
    flips_columns: bool


def check_file(path: Path) -> None:
    """Raise UnusableClip for what is no readable, regular file with something in it; opening a pipe would wait."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UnusableClip(f"cannot be read ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnusableClip("is not a file")
    if not status.st_size:
        raise UnusableClip("is empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise UnusableClip("may not be read (no permission)")


@contextmanager
def open_container(path: Path, **options: Any) -> Iterator[InputContainer]:
    """The container of a video file, and UnusableClip for what goes wrong with it while it is open."""
    check_file(path)
    try:
        with av.open(
            f"file:{path}",
            container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
            timeout=_PATIENCE_SECONDS,
            **options,
        ) as container:
            yield container
    except av.FFmpegError as error:
        raise UnusableClip(f"cannot be read as a video ({error.strerror})") from error


def picture_stream(container: InputContainer) -> VideoStream:
    """The stream that players show: the default one, then the largest. Cover art is none."""
    pictures = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    streams = [stream for stream in pictures if stream.codec_context is not None and stream.width and stream.height]
    if not pictures:
        raise UnusableClip("has sound, but no video" if container.streams.audio else "has no video in it")
    if not streams:
        raise UnusableClip("has a video that cannot be decoded here: its codec is unknown, or its header is damaged")
    return max(streams, key=lambda stream: (_is_default(stream), stream.width * stream.height, -stream.index))


def _is_default(stream: VideoStream) -> bool:
    return bool(stream.disposition & Disposition.default)


def pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height; 1 where a header says what no screen shows."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 <= aspect <= 10 else 1.0


def is_timed(container: InputContainer, stream: VideoStream) -> bool:
    """Whether frames carry the time at which they are shown. avi and bare streams do not: their frames are counted."""
    return stream.start_time is not None and container.format.name != "avi"


def turn_of(frame: VideoFrame) -> Turn:
    """How the frame's display matrix turns it. The matrix maps x to a x + c y, and y to b x + d y."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Turn(False, False, False)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Turn(True, flips_rows=b < 0, flips_columns=c < 0)
    return Turn(False, flips_rows=d < 0, flips_columns=a < 0)


def is_mp4(path: Path) -> bool:
    """Whether a file begins as an mp4 or mov does, with the length and the name of its first box."""
    with path.open("rb") as file:
        return file.read(8)[4:] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")


def is_track_turned(path: Path, track: int) -> bool:
    """Whether a track of an mp4 or mov lies on its side. FFmpeg tells that with decoded frames only."""
    with path.open("rb") as file:
        for content in _boxes(file, (b"moov", b"trak", b"tkhd"), 0, path.stat().st_size):
            identity, matrix = (20, 52) if content[:1] == b"\1" else (12, 40)  # by the version of the box
            if int.from_bytes(content[identity : identity + 4], "big") == track:
                a, b = (int.from_bytes(content[at : at + 4], "big", signed=True) for at in (matrix, matrix + 4))
                return abs(b) > abs(a)
    return False


def _boxes(file: BinaryIO, names: tuple[bytes, ...], start: int, end: int) -> Iterator[bytes]:
    """The first bytes of each box at a path of names, between two offsets of an mp4."""
    while start + 8 <= end:
        file.seek(start)
        size, name, header = int.from_bytes(file.read(4), "big"), file.read(4), 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        size = size or end - start
        if size < header:
            return
        if name == names[0] and len(names) == 1:
            file.seek(start + header)
            yield file.read(min(size - header, 96))
        elif name == names[0]:
            yield from _boxes(file, names[1:], start + header, min(start + size, end))
        start += size


def frames_from(
    container: InputContainer, stream: VideoStream, start_seconds: float, *, fps: float
) -> Iterator[ShownFrame]:
    """The frames in order, from the one on screen at `start_seconds` or an earlier one. `fps` stands in where frames
    carry no time or no duration."""
    timed = is_timed(container, stream)
    if timed and start_seconds > 0 and container.format.name not in _UNSEEKABLE:
        frames = _seek(container, stream, start_seconds)
    else:
        frames = decode(container, stream)
    seconds = -1 / fps
    for frame in frames:
        if timed and frame.pts is not None:
            seconds = seconds_of(frame, stream)
        else:
            seconds += 1 / fps
        yield ShownFrame(frame, seconds, seconds + frame_seconds(frame, fps))


def seconds_of(frame: Any, stream: VideoStream) -> float:
    """When a frame, or a packet of one, is shown, from the start of the stream."""
    return float((frame.pts - (stream.start_time or 0)) * frame.time_base)


def frame_seconds(frame: Any, fps: float) -> float:
    """How long a frame, or a packet of one, says that it is shown."""
    return float(frame.duration * frame.time_base) if frame.duration else 1 / fps


def _seek(container: InputContainer, stream: VideoStream, start_seconds: float) -> Iterator[VideoFrame]:
    """Decode from a key frame at or before the start. Formats without an index land somewhere near, perhaps behind it
    or between key frames; then further back is tried, at last the beginning."""
    ticks = 1 / tick_seconds(stream)
    origin = stream.start_time or 0
    start = origin + round(start_seconds * ticks)
    aim, step = start_seconds, 1.0
    while True:
        container.seek(origin + int((aim or -_LEAD_SECONDS) * ticks), stream=stream)
        frames = decode(container, stream)
        first = next(frames, None)
        if aim == 0 or (first and first.key_frame and first.pts is not None and first.pts <= start):
            return chain([first] if first else [], frames)
        aim, step = max(0.0, aim - step), step * 4


def tick_seconds(stream: VideoStream) -> float:
    """The unit of the stream's times."""
    assert stream.time_base is not None, "a stream that was opened has a time base"
    return float(stream.time_base)


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The stream's packets in the order in which they are stored; the last one is empty and flushes the decoder."""
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV knows only the streams that were there at the start
        raise UnusableClip("has a stream that begins in the middle, or is damaged") from error


def decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames in the order in which they are shown. What comes before the first key frame cannot be decoded and is
    passed over; damage behind it raises UnusableClip, as does a file that keeps one waiting."""
    has_begun, since = False, time.monotonic()
    for packet in packets_of(container, stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if has_begun:
                raise UnusableClip("is damaged: a frame of it cannot be decoded") from error
            continue
        if frames:
            has_begun, since = True, time.monotonic()
            yield from frames
        elif time.monotonic() - since > _PATIENCE_SECONDS:
            raise UnusableClip(f"gave no frame for {_PATIENCE_SECONDS:g} seconds")
