"""What is let in as a video, which of its streams is read, and the reason that everything else is given."""

import os
import time
from pathlib import Path

import av
import numpy as np
import pytest

from finetrainers.data.bucket import choose_bucket, choose_windows
from finetrainers.data.video import probe, read_window
from finetrainers.errors import UnusableClip
from finetrainers.types import Bucket, Window
from tests.data.coded import (
    B_FRAMES,
    FORMATS,
    HEIGHT,
    WIDTH,
    coded_picture,
    make,
    read_codes,
    write_coded,
    write_sound,
)


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    def add(path: Path, *, with_video: bool) -> Path:
        with av.open(str(path), "w") as file:
            art = file.add_stream("mjpeg", rate=1)
            art.height, art.width, art.pix_fmt = 200, 200, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic.value
            sound = file.add_stream("aac", rate=8000, layout="mono")
            video = file.add_stream("libx264", rate=25) if with_video else None
            if video:
                video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((200, 200, 3), np.uint8), format="rgb24")
            file.mux([*art.encode(picture), *art.encode(None)])
            write_sound(file, sound, seconds=1)
            for number in range(10 if video else 0):
                code = coded_picture(number, height=HEIGHT, width=WIDTH)
                file.mux(video.encode(av.VideoFrame.from_ndarray(code, format="rgb24")))
            if video:
                file.mux(video.encode(None))
        return path

    with pytest.raises(UnusableClip, match="has sound, but no video"):
        probe(add(tmp_path / "song.m4a.mp4", with_video=False))
    path = add(tmp_path / "film.mp4", with_video=True)
    media = probe(path)
    assert (media.width, media.num_frames) == (WIDTH, 10)
    pixels = read_window(path, media, Window(0.0, 10, 25.0), height=HEIGHT, width=WIDTH)
    assert read_codes(pixels) == list(range(10))


def test_of_two_videos_the_default_is_read_then_the_larger(tmp_path: Path) -> None:
    for default in (None, 0, 1):
        path = tmp_path / f"{default}.mkv"
        with av.open(str(path), "w") as file:
            streams = []
            for number, size in enumerate((64, 128)):
                stream = file.add_stream("libx264", rate=25)
                stream.height = stream.width = size
                stream.pix_fmt = "yuv420p"
                stream.disposition = av.stream.Disposition.default.value if number == default else 0
                streams.append(stream)
            for stream in streams:
                for _ in range(5):
                    picture = av.VideoFrame.from_ndarray(np.zeros((stream.height, stream.width, 3), np.uint8), "rgb24")
                    file.mux(stream.encode(picture))
                file.mux(stream.encode(None))
        assert probe(path).width == (64 if default == 0 else 128)


def damage(data: bytes, kind: str) -> bytes:
    draw = np.random.default_rng(0)
    changed = bytearray(data)
    if kind == "bit flips":
        for place in draw.integers(len(data) // 10, len(data), 40):
            changed[place] ^= 1 << int(draw.integers(8))
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text": b"The quick brown fox jumps over the lazy dog.\n" * 200,
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://localhost:1/a.ts\n#EXT-X-ENDLIST\n",
        "list of files": b"ffconcat version 1.0\nfile 'sound.mp4'\n",
        "random bytes": draw.bytes(20_000),
        "truncated": data[: len(data) // 2],
        "bit flips": bytes(changed),
        "huge header": b"\x00\x00\x00\x01moov" + (2**40).to_bytes(8, "big") + b"\x00" * 100,
    }[kind]


def usable_or_reason(path: Path, *, num_frames: int = 17) -> str:
    """Go the whole way of a clip. The reason why it cannot be used, or an empty string."""
    try:
        media = probe(path)
        bucket = choose_bucket(media, [Bucket(num_frames, 64, 96)], None)
        for window in choose_windows(media, bucket, None, "all"):
            assert read_window(path, media, window, height=64, width=96).shape == (num_frames, 3, 64, 96)
    except UnusableClip as error:
        assert len(str(error)) > 10 and "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("faststart", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "is empty"),
        ("html", "cannot be read as a video"),
        ("text", "cannot be read as a video"),
        ("playlist", "cannot be read as a video"),
        ("list of files", "cannot be read as a video"),
        ("random bytes", "cannot be read as a video"),
        ("truncated", "cannot be read as a video|is cut short|is damaged"),
        ("bit flips", ""),
        ("huge header", "has no video in it"),
    ],
)
def test_damaged_files_have_a_reason(tmp_path: Path, kind: str, reason: str, faststart: bool) -> None:
    muxing = {"movflags": "+faststart"} if faststart else {}
    sound = make(tmp_path, "sound.mp4", sound_seconds=2, muxing=muxing, **B_FRAMES)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damage(sound.read_bytes(), kind))
    start = time.monotonic()
    found = usable_or_reason(path)
    assert time.monotonic() - start < 10
    if reason:
        assert any(found.startswith(words) for words in reason.split("|")), found


@pytest.mark.parametrize("name", ["plain.mkv", "plain.ts", "plain.avi", "vp9.webm", "hevc.mp4", "animation.gif"])
def test_files_cut_and_changed_at_random_never_surprise(tmp_path: Path, name: str) -> None:
    data = make(tmp_path, name, **FORMATS[name]).read_bytes()
    draw = np.random.default_rng(1)
    path = tmp_path / f"damaged{Path(name).suffix}"
    for _ in range(12):
        changed = bytearray(data[: int(draw.integers(1, len(data)))] if draw.random() < 0.5 else data)
        for place in draw.integers(0, len(changed), int(draw.choice([0, 1, 20]))):
            changed[place] = int(draw.integers(256))
        path.write_bytes(changed)
        usable_or_reason(path)


def test_what_is_no_readable_file_has_a_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    for name, words in {
        "absent.mp4": "No such file",
        "gone.mp4": "No such file",
        "loop.mp4": "symbolic links",
        "pipe.mp4": "is not a file",
        ".": "is not a file",
        "a\0b.mp4": "cannot be read",
    }.items():
        assert words in usable_or_reason(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_has_a_reason(tmp_path: Path) -> None:
    path = make(tmp_path, "a.mp4")
    path.chmod(0)
    assert "no permission" in usable_or_reason(path)


def test_small_short_and_silent_clips(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        write_sound(file, file.add_stream("aac", rate=8000, layout="mono"), seconds=1)
    assert usable_or_reason(tmp_path / "sound.mp4") == "has sound, but no video"
    one = write_coded(tmp_path / "one.mp4", num_frames=1)
    assert "1 frame at 25 fps" in usable_or_reason(one) and usable_or_reason(one, num_frames=1) == ""
    short = write_coded(tmp_path / "short.mp4", num_frames=16)
    assert "16 frames" in usable_or_reason(short)
    assert usable_or_reason(write_coded(tmp_path / "tiny.mp4", height=16, width=16)) == ""


def test_names_that_look_like_addresses_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "http:b.mp4", "-c.mp4", "ü \udcff %d.mp4"):
        write_coded(tmp_path / "plain.mp4").rename(name)
        assert usable_or_reason(Path(name)) == ""


def test_reading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = make(tmp_path, "a.ts", **B_FRAMES)
    path.write_bytes(damage(path.read_bytes(), "bit flips"))
    capfd.readouterr()
    usable_or_reason(path)
    assert capfd.readouterr() == ("", "")
