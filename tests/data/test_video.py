"""The frames that are read are exactly those on screen at the asked times, whatever the container and the codec."""

import math
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from finetrainers.data.bucket import choose_bucket, choose_windows, cover
from finetrainers.data.source import read_source
from finetrainers.data.video import probe, read_window, write_video
from finetrainers.errors import UnusableClip
from finetrainers.types import Bucket, Media, Window
from tests.data.coded import (
    B_FRAMES,
    FORMATS,
    HEIGHT,
    NUM_FRAMES,
    WIDTH,
    coded_picture,
    make,
    read_codes,
    shifted_copy,
    write_coded,
)


def read(path: Path, media: Media, *, start: float, num_frames: int, fps: float) -> list[int]:
    return read_codes(read_window(path, media, Window(start, num_frames, fps), height=HEIGHT, width=WIDTH))


@pytest.mark.parametrize("name", FORMATS)
def test_each_frame_is_read_once_from_wherever_one_starts(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, name, **FORMATS[name])
    media = probe(path)
    assert (media.width, media.height, media.num_frames, media.fps) == (WIDTH, HEIGHT, NUM_FRAMES, 25.0)
    assert media.duration_seconds == pytest.approx(NUM_FRAMES / 25)
    assert read(path, media, start=0.0, num_frames=NUM_FRAMES, fps=25.0) == list(range(NUM_FRAMES))
    for first in (1, 11, 12, 13, 25, 37, 39):
        count = min(3, NUM_FRAMES - first)
        assert read(path, media, start=first / 25, num_frames=count, fps=25.0) == list(range(first, first + count))
    with pytest.raises(UnusableClip, match=f"{NUM_FRAMES} of the {NUM_FRAMES + 1} frames"):
        read(path, media, start=0.0, num_frames=NUM_FRAMES + 1, fps=25.0)


def frame_at(times: list[Fraction], moment: Fraction, tolerance: Fraction) -> int:
    """The last frame whose time has come: the rule itself, on exact numbers."""
    return max((number for number, time in enumerate(times) if time <= moment + tolerance), default=0)


RATES = [8, 12, 16, Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 48, 60]


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_what_bucket_promises_video_delivers(tmp_path: Path, rate: Fraction | int) -> None:
    path = make(tmp_path, "a.mp4", rate=rate, **B_FRAMES)
    media = probe(path)
    assert media.fps == pytest.approx(float(rate)) and media.num_frames == NUM_FRAMES
    times = [number / Fraction(rate) for number in range(NUM_FRAMES)]
    for wanted in (None, *map(float, RATES), 7.77, 29.97, 100.0):
        fps = wanted or media.fps
        bucket = Bucket(9, HEIGHT, WIDTH)
        if media.duration_seconds * fps < bucket.num_frames:
            continue
        for window in choose_windows(media, choose_bucket(media, [bucket], wanted), wanted, "all"):
            found = read(path, media, start=window.start_seconds, num_frames=9, fps=fps)
            moments = [Fraction(window.start_seconds) + k / Fraction(fps) for k in range(9)]
            assert found == [frame_at(times, moment, Fraction(1, 100_000)) for moment in moments], (wanted, window)


@pytest.mark.parametrize(
    # mkv counts in milliseconds, half of which is the tolerance; a moment right on its edge may go either way.
    ("name", "tolerances"), [("a.mp4", [Fraction(1, 10**5)]), ("a.mkv", [Fraction(4, 10**4), Fraction(6, 10**4)])]
)  # fmt: skip
@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_varying_rate_is_read_by_the_clock(
    tmp_path: Path, name: str, tolerances: list[Fraction], b_frames: int
) -> None:
    steps = [1, 1, 9, 2, 30, 1, 4, 1, 1, 14] * (NUM_FRAMES // 10)  # ticks of 10 ms that each frame is shown
    ticks = [sum(steps[:number]) for number in range(NUM_FRAMES)]
    options = {"bf": str(b_frames), "g": "12"}
    path = make(tmp_path, name, rate=25, times=ticks, tick=Fraction(1, 100), options=options)
    media = probe(path)
    assert media.num_frames == NUM_FRAMES
    times = [Fraction(tick, 100) for tick in ticks]
    # How long the last frame is shown is the muxer's guess.
    assert media.duration_seconds > times[-1]
    for fps in (8.0, 25.0, 50.0, None):
        for window in choose_windows(media, Bucket(17, HEIGHT, WIDTH), fps, "all"):
            found = read(path, media, start=window.start_seconds, num_frames=17, fps=window.fps)
            moments = [Fraction(window.start_seconds) + k / Fraction(window.fps) for k in range(17)]
            for number, moment in zip(found, moments, strict=True):
                assert number in {frame_at(times, moment, tolerance) for tolerance in tolerances}, (window, moment)


@pytest.mark.parametrize("steps", [[100] + [2] * 39, [2] * 39 + [100], [2] * 20 + [100] + [2] * 19])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_pause_promises_no_frame_that_is_not_there(tmp_path: Path, name: str, steps: list[int]) -> None:
    ticks = [sum(steps[:number]) for number in range(NUM_FRAMES)]
    media = probe(path := make(tmp_path, name, times=ticks, tick=Fraction(1, 100), options={"bf": "2", "g": "12"}))
    for fps in (25.0, 50.0, 100.0, None):
        for window in choose_windows(media, Bucket(9, HEIGHT, WIDTH), fps, "all"):
            read(path, media, start=window.start_seconds, num_frames=9, fps=window.fps)


@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001), 60, 120], ids=str)
def test_times_rounded_to_a_millisecond_neither_add_nor_lose_a_frame(tmp_path: Path, rate: Fraction | int) -> None:
    for count in range(20, 32):
        path = write_coded(tmp_path / "a.mkv", num_frames=count, rate=rate, height=32, width=64)
        media = probe(path)
        assert media.fps == float(rate)
        (window,) = choose_windows(media, choose_bucket(media, [Bucket(count, 32, 64)], None), None, "all")
        assert read_codes(read_window(path, media, window, height=32, width=64)) == list(range(count))
        with pytest.raises(UnusableClip, match=f"{count} frames"):
            choose_bucket(media, [Bucket(count + 1, 32, 64)], None)


def test_an_edit_list_that_cuts_is_kept_to(tmp_path: Path) -> None:
    whole = make(tmp_path, "whole.mp4", **B_FRAMES)
    path = shifted_copy(whole, tmp_path / "cut.mp4", frames=7)
    media = probe(path)
    assert (media.num_frames, media.fps) == (NUM_FRAMES - 7, 25.0)
    left = NUM_FRAMES - 7
    assert read(path, media, start=0.0, num_frames=left, fps=25.0) == list(range(7, NUM_FRAMES))
    assert read(path, media, start=10 / 25, num_frames=5, fps=25.0) == list(range(17, 22))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_pixels_that_are_not_square_widen_the_picture(tmp_path: Path, name: str) -> None:
    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    path = make(tmp_path, name, prepare=prepare)
    media = probe(path)
    assert (media.width, media.height) == (round(WIDTH * 4 / 3), HEIGHT)
    window = Window(0.0, NUM_FRAMES, 25.0)
    # Scaled to the full picture nothing is cropped, so that every band is still there.
    assert read_codes(read_window(path, media, window, height=HEIGHT, width=media.width // 8 * 8)) == list(range(40))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    ("degrees", "hflip", "vflip"), [(0, False, False), (90, False, False), (180, False, False), (-90, False, False),
                                    (0, True, False), (0, False, True), (90, True, False)]
)  # fmt: skip
def test_a_turned_video_is_read_upright(tmp_path: Path, name: str, degrees: int, hflip: bool, vflip: bool) -> None:
    def prepare(stream: Any) -> None:
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)

    path = make(tmp_path, name, prepare=prepare)
    media = probe(path)
    # FFmpeg rotates counterclockwise, then mirrors, as numpy does; the coded bands stand upright in the file.
    coded = np.rot90(coded_picture(0b0000_0101, height=HEIGHT, width=WIDTH), degrees // 90)
    expected = coded[:, ::-1] if hflip else coded
    expected = expected[::-1] if vflip else expected
    assert (media.height, media.width) == expected.shape[:2]
    pixels = read_window(path, media, Window(5 / 25, 1, 25.0), height=media.height, width=media.width)[0]
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 8


def yuv_to_rgb(y: float, u: float, v: float, *, red: float, blue: float, is_full: bool) -> list[float]:
    """ITU-T H.273, for 8 bits."""
    scale, offset, chroma = (255, 0, 255) if is_full else (219, 16, 224)
    luma, to_blue, to_red = (y - offset) / scale, (u - 128) / chroma, (v - 128) / chroma
    r, b = luma + 2 * (1 - red) * to_red, luma + 2 * (1 - blue) * to_blue
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return [255 * min(1, max(0, value)) for value in (r, g, b)]


BT601, BT709, BT2020 = {"red": 0.299, "blue": 0.114}, {"red": 0.2126, "blue": 0.0722}, {"red": 0.2627, "blue": 0.0593}


@pytest.mark.parametrize(
    ("matrix", "is_full", "size", "law"),
    [
        pytest.param(1, False, (96, 160), BT709, id="bt709"),
        pytest.param(6, False, (96, 160), BT601, id="bt601"),
        pytest.param(9, False, (96, 160), BT2020, id="bt2020"),
        pytest.param(1, True, (96, 160), BT709, id="bt709 full range"),
        pytest.param(6, True, (96, 160), BT601, id="bt601 full range"),
        pytest.param(2, False, (480, 640), BT601, id="SD that names none"),
        pytest.param(2, False, (720, 1280), BT709, id="HD that names none"),
        pytest.param(2, False, (1280, 720), BT709, id="portrait HD that names none"),
    ],
)
@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_colours_are_those_of_the_stream(
    tmp_path: Path, matrix: int, is_full: bool, size: tuple[int, int], law: dict[str, float], scale: float
) -> None:
    path, (height, width), yuv = tmp_path / "a.mp4", size, (120, 90, 170)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if is_full else 1
        frame = av.VideoFrame(width, height, "yuv420p")
        frame.colorspace, frame.color_range = matrix, 2 if is_full else 1
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        file.mux([*stream.encode(frame), *stream.encode(None)])
    found = read_window(path, probe(path), Window(0.0, 1, 25.0), height=int(height * scale), width=int(width * scale))
    expected = yuv_to_rgb(*yuv, is_full=is_full, **law)
    assert found.float().mean((0, 2, 3)).tolist() == pytest.approx(expected, abs=1.0)
    assert found.float().std((0, 2, 3)).max() < 0.5


def test_crop_is_centred_and_nothing_is_squeezed(tmp_path: Path) -> None:
    pixels = np.zeros((5, 96, 288, 3), np.uint8)
    pixels[:, :, 96:192] = 255
    write_video(tmp_path / "wide.mp4", pixels, 25.0)
    write_video(tmp_path / "tall.mp4", pixels.transpose(0, 2, 1, 3), 25.0)
    for name in ("wide.mp4", "tall.mp4"):
        media = probe(tmp_path / name)
        for size in (96, 48, 192):
            found = read_window(tmp_path / name, media, Window(0.0, 5, 25.0), height=size, width=size)
            assert found.shape == (5, 3, size, size) and found.is_contiguous()
            assert found[:, :, size // 8 : -size // 8, size // 8 : -size // 8].min() > 240


@pytest.mark.parametrize("size", [(64, 96), (63, 95), (2, 2), (1, 1)])
@pytest.mark.parametrize("fps", [8.0, 23.976, 30000 / 1001, 16])
def test_a_written_video_reads_back(tmp_path: Path, size: tuple[int, int], fps: float) -> None:
    height, width = size
    grey = np.linspace(0, 255, 9).astype(np.uint8)
    video_FHWC = np.broadcast_to(grey[:, None, None, None] * np.array([1, 0, 1], np.uint8), (9, height, width, 3))
    path = tmp_path / "new" / "a.mp4"
    write_video(path, video_FHWC, fps)
    media = probe(path)
    assert (media.height, media.width) == (height + height % 2, width + width % 2)
    assert media.num_frames == 9 and media.fps == pytest.approx(fps, rel=1e-4)
    found = read_window(path, media, Window(0.0, 9, media.fps), height=media.height, width=media.width)
    assert np.abs(found.permute(0, 2, 3, 1)[:, :height, :width].numpy().astype(int) - video_FHWC).mean() < 3
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_a_video_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((3, 16, 16, 3), np.uint8), 8.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"shape|dimension|float"):
        write_video(path, np.zeros((3, 16, 16, 3), np.float64), 8.0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    path = make(tmp_path, "a.mp4", **B_FRAMES)
    media, found = probe(path), []

    def work(first: int) -> None:
        found.append(read(path, media, start=first / 25, num_frames=5, fps=25.0) == list(range(first, first + 5)))

    threads = [threading.Thread(target=work, args=[first]) for first in range(0, 32, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def slow_reference(path: Path, moments: list[float], *, height: int, width: int) -> torch.Tensor:
    """Frames decoded from the first on, on one thread, picked by their time, turned to RGB at full size, and resized by
    Pillow."""
    shown: dict[float, Any] = {}
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda stream: stream.width)
        stream.thread_type, origin = "NONE", None
        for frame in container.decode(stream):
            origin = frame.pts if origin is None else origin
            seconds = float((frame.pts - origin) * stream.time_base)
            shown |= {moment: frame for moment in moments if seconds <= moment + float(stream.time_base / 2)}
            if seconds > moments[-1]:
                break
    picked = []
    for frame in map(shown.__getitem__, moments):
        is_hd = frame.width >= 1280 or frame.height > 576
        matrix = {1: 1, 5: 5, 6: 5}.get(frame.colorspace, 1 if is_hd else 5)
        # Bicubic, with accurate rounding and colour at full width.
        full = frame.reformat(format="rgb24", src_colorspace=matrix, dst_colorspace=matrix, src_color_range=1,
                              dst_color_range=2, interpolation=0x4 | 0x40000 | 0x2000 | 0x4000)  # fmt: skip
        size = cover(frame.width, frame.height, bucket_width=width, bucket_height=height)
        scaled = np.asarray(full.to_image().resize(size, Image.Resampling.BICUBIC))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        picked.append(torch.tensor(scaled[top : top + height, left : left + width]).permute(2, 0, 1))
    return torch.stack(picked)


def test_real_clips_read_as_a_slow_reader_reads_them(real_clips: Path) -> None:
    paths = [record.path for record in read_source(real_clips)]
    paths += [real_clips / name for name in ("h264_10bits.mp4", "h265_video.mp4")]
    buckets = [Bucket(49, 192, 320), Bucket(25, 192, 320), Bucket(9, 192, 320), Bucket(9, 160, 160)]
    for path in paths:
        media = probe(path)
        bucket = choose_bucket(media, buckets, None)
        window = choose_windows(media, bucket, None, "middle")[0]
        found = read_window(path, media, window, height=bucket.height, width=bucket.width)
        chosen = range(0, bucket.num_frames, 6)
        moments = [window.start_seconds + number / window.fps for number in chosen]
        assert math.isclose(window.fps, media.fps)
        expected = slow_reference(path, moments, height=bucket.height, width=bucket.width)
        difference = (found[list(chosen)].float() - expected.float()).abs().mean((1, 2, 3))
        assert difference.max() < 0.75, (path.name, difference)
