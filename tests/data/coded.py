"""Videos whose every frame says which one it is, so that a test knows exactly what was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch import Tensor

BITS = 8
DARK, BRIGHT = 40, 215
SOUND_RATE = 8000
NUM_FRAMES, HEIGHT, WIDTH = 40, 96, 160


def coded_picture(number: int, *, height: int, width: int) -> np.ndarray:
    """RGB, HWC: one upright band per bit of the number, bright for 1, the lowest bit on the left."""
    bands = [BRIGHT if number >> bit & 1 else DARK for bit in range(BITS)]
    columns = np.repeat(np.array(bands, np.uint8), width // BITS)
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()


def read_codes(video_FCHW: Tensor) -> list[int]:
    """The number of each frame; fails where a band is neither bright nor dark."""
    numbers = []
    width = video_FCHW.shape[-1] // BITS
    for frame_CHW in video_FCHW:
        number = 0
        for bit in range(BITS):
            middle = frame_CHW[:, :, bit * width + width // 4 : (bit + 1) * width - width // 4].float().mean().item()
            assert min(abs(middle - DARK), abs(middle - BRIGHT)) < 30, f"band {bit} is {middle}"
            number |= (middle > (DARK + BRIGHT) / 2) << bit
        numbers.append(number)
    return numbers


def write_coded(
    path: Path,
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    container: str | None = None,
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    tick: Fraction | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    sound_seconds: float = 0,
) -> Path:
    """Write frames 0, 1, 2, ... at `rate`, or at `times` counted in `tick`. `prepare` may change the stream first."""
    with av.open(str(path), "w", format=container, options=muxing or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        tick = tick or 1 / Fraction(rate)
        stream.codec_context.time_base = tick
        prepare(stream)
        sound = file.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound_seconds else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(coded_picture(number, height=height, width=width), format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            write_sound(file, sound, seconds=sound_seconds)
    return path


def write_sound(file: Any, stream: Any, *, seconds: float) -> None:
    for start in range(0, int(seconds * SOUND_RATE), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SOUND_RATE, start
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def shifted_copy(source: Path, path: Path, *, frames: int) -> Path:
    """The same packets, shown `frames` earlier: an edit list hides those that fall before the start."""
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new,
    ):
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = round(frames / stream.average_rate / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return path


B_FRAMES = {"options": {"bf": "2", "g": "12"}}
OPEN_GOP = {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}}
QUIET_X265 = {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}}

FORMATS: dict[str, dict[str, Any]] = {
    "plain.mp4": B_FRAMES,
    "plain.mov": B_FRAMES,
    "plain.mkv": B_FRAMES,
    "plain.ts": B_FRAMES,
    "plain.avi": B_FRAMES,
    "plain.flv": B_FRAMES,
    "stream.h264": B_FRAMES,
    "intra_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
    "open_gop.mp4": OPEN_GOP,
    "open_gop.ts": OPEN_GOP,
    "open_gop.mkv": OPEN_GOP,
    "fragmented.mp4": {**B_FRAMES, "muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "no_duration.mkv": {**B_FRAMES, "muxing": {"live": "1"}},
    "late_start.mp4": {**B_FRAMES, "times": range(100, 100 + NUM_FRAMES)},
    "late_start.ts": {**B_FRAMES, "times": range(100, 100 + NUM_FRAMES)},
    "ten_bit.mp4": {**B_FRAMES, "pixel_format": "yuv420p10le"},
    "full_chroma.mp4": {**B_FRAMES, "pixel_format": "yuv444p"},
    "long_sound.mkv": {**B_FRAMES, "sound_seconds": 4},
    "long_sound.mp4": {**B_FRAMES, "sound_seconds": 4},
    "hevc.mp4": QUIET_X265,
    "hevc.ts": QUIET_X265,
    "stream.hevc": QUIET_X265,
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9.ivf": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
    "stream.obu": {"codec": "libsvtav1"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "prores.mov": {"codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "lossless.mkv": {"codec": "ffv1"},
    "animation.gif": {"codec": "gif", "pixel_format": "rgb8"},
}
"""Ways to write the same clip: one of NUM_FRAMES frames, 25 a second."""


def make(folder: Path, name: str, **settings: Any) -> Path:
    """Write a coded clip, or skip the test where its codec is missing."""
    codec = settings.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec} to write the clip with")
    return write_coded(folder / name, **settings)
