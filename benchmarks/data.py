"""How fast clips are read, how much memory that takes, and what looking at a file costs (B7, B8, B9).

    python benchmarks/data.py

prints what it measures as JSON and writes it to benchmarks/results/data.json. Clips are rendered into a temporary
folder; rates are medians of interleaved rounds, and mean frames used per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from machine import describe_machine, write_record

from finetrainers.data.bucket import choose_windows
from finetrainers.data.index import FileIndex
from finetrainers.data.video import probe, read_window
from finetrainers.types import Bucket

BUCKET = Bucket(49, 512, 768)
CLIPS = {"720p, 300 frames": (300, 720, 1280), "480p, 60 frames": (60, 480, 854), "1080p, 90 frames": (90, 1080, 1920)}
LONG_CLIPS = {"10 s": (300, 720, 1280), "60 s": (1800, 720, 1280)}
PEERS = {
    "finetrainers main": (5.6, 54, 7.8),
    "finetrainers v0.0.1": (24, 87, 19),
    "LTX-Video-Trainer": (22, 59, 15),
    "musubi-tuner": (64, 79, 26),
    "OpenCV loop": (129, 548, 81),
    "torchcodec 0.13 and interpolate": (188, 366, 98),
    "bare PyAV decode": (589, 1962, 291),
}
"""Frames used per second to the same bucket on 2 cores, on other clips of these sizes. Measured before, not here: a
peer's rate is also given scaled by how much faster a bare decode is here than it was there."""

MEMORY_PROGRAM = """
import sys
from pathlib import Path
from finetrainers.data.bucket import choose_windows
from finetrainers.data.video import probe, read_window
from finetrainers.types import Bucket

def kib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)

path, policy, bucket = Path(sys.argv[1]), sys.argv[2], Bucket.parse(sys.argv[3])
imported = kib("VmRSS")
media = probe(path)
for window in choose_windows(media, bucket, None, policy):
    read_window(path, media, window, height=bucket.height, width=bucket.width)
print((kib("VmHWM") - imported) / 1024)
"""


def render(path: Path, *, num_frames: int, height: int, width: int) -> Path:
    """A camera that pans over a landscape with a little grain while a disc crosses it."""
    draw = np.random.default_rng(0)
    coarse = torch.tensor(draw.uniform(0, 255, (1, 3, height // 40, width // 40)), dtype=torch.float32)
    ground = (
        torch.nn.functional.interpolate(coarse, (height * 2, width * 2), mode="bicubic")[0].permute(1, 2, 0).numpy()
    )
    ground = np.clip(ground + draw.normal(0, 2, ground.shape), 0, 255).astype(np.uint8)
    y, x = np.ogrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(num_frames):
            turn = number / 60
            top, left = (round(size * (0.5 + 0.45 * wave(turn))) for size, wave in ((height, np.sin), (width, np.cos)))
            picture = ground[top : top + height, left : left + width].copy()
            picture[(y - height / 2) ** 2 + (x - number * 9 % width) ** 2 < (height / 6) ** 2] = (230, 60, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode_only(path: Path) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", 2
        for number, _ in enumerate(container.decode(stream), start=1):
            if number == BUCKET.num_frames:
                return


def measure_reading(folder: Path, rounds: int) -> dict[str, Any]:
    results = {}
    for place, (name, (num_frames, height, width)) in enumerate(CLIPS.items()):
        path = render(folder / f"{height}p.mp4", num_frames=num_frames, height=height, width=width)
        media = probe(path)
        (window,) = choose_windows(media, BUCKET, None, "first")
        read = partial(read_window, path, media, window, height=BUCKET.height, width=BUCKET.width)
        times: dict[str, list[float]] = {"read": [], "decode": []}
        processor_seconds = 0.0
        for _ in range(rounds + 1):
            started = time.process_time()
            times["read"].append(seconds_of(read))
            processor_seconds += time.process_time() - started
            times["decode"].append(seconds_of(partial(decode_only, path)))
        ours, bare = (BUCKET.num_frames / statistics.median(times[kind][1:]) for kind in ("read", "decode"))
        here = bare / PEERS["bare PyAV decode"][place]
        results[name] = {
            "frames_per_second": round(ours, 1),
            "bare_decode_frames_per_second": round(bare, 1),
            "ratio_to_bare_decode": round(ours / bare, 3),
            "processor_ms_per_frame": round(processor_seconds / (rounds + 1) / BUCKET.num_frames * 1e3, 2),
            "times_each_peer": {peer: round(ours / rates[place], 2) for peer, rates in PEERS.items()},
            "times_each_peer_scaled": {peer: round(ours / (rates[place] * here), 2) for peer, rates in PEERS.items()},
        }
    return results


def measure_memory(folder: Path) -> dict[str, Any]:
    results = {}
    for name, (num_frames, height, width) in LONG_CLIPS.items():
        path = render(folder / f"{num_frames}.mp4", num_frames=num_frames, height=height, width=width)
        for policy in ("first", "middle"):
            command = [sys.executable, "-c", MEMORY_PROGRAM, str(path), policy, str(BUCKET)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[f"{name} 720p, {policy} window"] = round(float(done.stdout))
    return results


def measure_index(folder: Path, rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for path in sorted(folder.glob("*p.mp4")):
        probes = [seconds_of(partial(probe, path)) for _ in range(10 * rounds)]
        results[f"probe {path.stem}, ms"] = round(statistics.median(probes) * 1e3, 2)
    clips = [folder / f"copy{number:03d}.mp4" for number in range(200)]
    for clip in clips:
        clip.write_bytes((folder / "480p.mp4").read_bytes())
    index = FileIndex(folder / "files.json")
    cold = [seconds_of(partial(index.look, clip)) for clip in clips]
    index.save()
    load = seconds_of(lambda: FileIndex(folder / "files.json"))
    again = FileIndex(folder / "files.json")
    warm = [seconds_of(lambda: [again.look(clip) for clip in clips]) / len(clips) for _ in range(rounds)]
    return results | {
        f"look, first time, digest of {clips[0].stat().st_size / 2**20:.1f} MiB included, ms": round(
            statistics.median(cold) * 1e3, 2
        ),
        "look, from the index, us": round(statistics.median(warm) * 1e6, 1),
        "load an index of 200 files, ms": round(load * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how clips are read.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": describe_machine() | {"load_before": round(os.getloadavg()[0], 1)},
            f"reading to {BUCKET} on 2 threads": measure_reading(Path(folder), arguments.rounds),
            "index": measure_index(Path(folder), arguments.rounds),
            f"peak memory above imports while reading to {BUCKET}, MiB": measure_memory(Path(folder)),
            "peers, frames used per second": PEERS,
        }
    write_record(arguments.out, results)


if __name__ == "__main__":
    main()
