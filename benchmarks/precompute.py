"""B10: encoding sixteen clips with a VAE that costs nothing, over a bare reading of the same clips; a clip is decoded
once; what a kill costs.

    python benchmarks/precompute.py
    python benchmarks/precompute.py --clips FOLDER

prints what it measures as JSON and writes it to benchmarks/results/precompute.json, under `rendered` or `filmed`.
Clips are rendered into a temporary folder, or are windows of those in FOLDER, which has a metadata.csv. Times are
medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from data import BUCKET, PEERS, decode_only, render, seconds_of
from machine import describe_machine, write_record
from tiny_ltx import write_tiny_ltx

from finetrainers import encoding
from finetrainers.config.schema import DataConfig, ModelConfig
from finetrainers.data.cache import Cache
from finetrainers.data.clip import read_clip
from finetrainers.data.dataset import Dataset
from finetrainers.data.index import FileIndex
from finetrainers.data.scan import Item, scan
from finetrainers.data.source import read_source
from finetrainers.encoding import Encoder, encode_dataset
from finetrainers.engines.single import SingleEngine
from finetrainers.families.ltx import LTXVideo

NUM_CLIPS = 16
NUM_KILLS = 3
NUM_WORKERS = int(DataConfig.model_fields["num_workers"].default)
FRAMES, HEIGHT, WIDTH = 300, 720, 1280
GOALS = {"decodes per clip": 1.0, "times v0.0.1": 8, "whole clips encoded again after a kill": 1}
DECODES_OF_PEER = 2
"""v0.0.1 decodes a clip for its prompt and again for its latents (quoted, not measured here)."""


class Stub(LTXVideo):
    """Latents are single pixels, so that reading binds; the text encoder is a tiny T5."""

    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {}

    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels_CFHW = video_FCHW[::8, :, ::32, ::32].transpose(0, 1).bfloat16()
        # As many numbers as LTX-Video's latents have.
        mean = pixels_CFHW.repeat(43, 1, 1, 1)[:128]
        return {"mean": mean, "logvar": torch.zeros_like(mean), "shift": torch.zeros(128), "scale": torch.ones(128)}


class Quiet:
    """Progress that is not shown."""

    def advance(self, n: int = 1) -> None:
        pass


@contextmanager
def quiet(title: str, total: int) -> Iterator[Quiet]:
    yield Quiet()


def rendered_items(folder: Path) -> list[Item]:
    """Copies of one clip that differ in a byte that nobody decodes."""
    clip = render(folder / "clip.mp4", num_frames=FRAMES, height=HEIGHT, width=WIDTH).read_bytes()
    (folder / "clip.mp4").unlink()
    for number in range(NUM_CLIPS):
        (folder / f"{number:02d}.mp4").write_bytes(clip + bytes([number]))
        (folder / f"{number:02d}.txt").write_text(f"a disc crosses a landscape, take {number}")
    return items_of(folder, folder / "files.json", window="first")


def items_of(clips: Path, index: Path, *, window: Any) -> list[Item]:
    items, _ = scan(read_source(clips), FileIndex(index), buckets=[BUCKET], fps=None, window=window)
    # Of each clip some windows, rather than all windows of some clips.
    items = sorted(items, key=lambda item: item.window.start_seconds)[:NUM_CLIPS]
    if len(items) < NUM_CLIPS:
        sys.exit(f"{clips} holds {len(items)} windows of {BUCKET.num_frames} frames, and {NUM_CLIPS} are needed")
    return items


def encoder_of(model: Path, cache: Path) -> Encoder:
    family = Stub(model, ModelConfig(path=str(model)))
    return Encoder(family, Cache(cache), SingleEngine(), torch.bfloat16, NUM_WORKERS, quiet)


def encode(items: list[Item], model: Path, cache: Path) -> None:
    encode_dataset(encoder_of(model, cache), Dataset(items, [], [], len(items)), trigger="", prompts=())


def encode_clips(items: list[Item], model: Path, cache: Path) -> None:
    encoder = encoder_of(model, cache)
    encoder.encode_clips(items, encoder.samples(items, trigger=""))


def read(item: Item) -> None:
    read_clip(item.record, item.media, item.window, item.bucket)


def read_all(items: list[Item]) -> None:
    for item in items:
        read(item)


def read_all_in_threads(items: list[Item]) -> None:
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        list(pool.map(read, items))


def counted(count: Callable[[], None]) -> Any:
    """In the block, each decoding of a clip is counted first."""

    def read_counted(*given: Any) -> Any:
        count()
        return read_clip(*given)

    return patch.object(encoding, "read_clip", read_counted)


def measure_rates(items: list[Item], model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"loop": [], "threads": [], "clips": [], "all": []}
    processor_seconds: dict[str, list[float]] = {kind: [] for kind in seconds}
    decodes: list[int] = []
    for number in range(rounds + 1):
        works = {
            "loop": partial(read_all, items),
            "threads": partial(read_all_in_threads, items),
            "clips": partial(encode_clips, items, model, folder / f"clips{number}"),
            "all": partial(encode, items, model, folder / f"all{number}"),
        }
        for kind, work in works.items():
            started = time.process_time()
            with counted(lambda: decodes.append(1)):
                seconds[kind].append(seconds_of(work))
            processor_seconds[kind].append(time.process_time() - started)
    taken = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    worked = {kind: statistics.median(times[1:]) for kind, times in processor_seconds.items()}
    return {
        "clips_per_second": round(len(items) / taken["clips"], 2),
        "clips_and_captions_per_second": round(len(items) / taken["all"], 2),
        "bare_reading_clips_per_second": {
            "one after another": round(len(items) / taken["loop"], 2),
            f"{NUM_WORKERS} threads": round(len(items) / taken["threads"], 2),
        },
        "ratio_to_bare_reading_in_as_many_threads": round(taken["threads"] / taken["clips"], 3),
        "the_same_with_captions": round(taken["threads"] / taken["all"], 3),
        "processor_time_over_that_of_bare_reading": round(worked["clips"] / worked["threads"], 3),
        "decodes_per_clip": len(decodes) / (2 * (rounds + 1)) / len(items),
    }


def compare_to_peer(clips_per_second: float, item: Item, rounds: int) -> dict[str, Any]:
    """v0.0.1 takes two decodings of a clip of this size, at the rate that was measured of it elsewhere."""
    peer = PEERS["finetrainers v0.0.1"][0] / BUCKET.num_frames / DECODES_OF_PEER
    bare = BUCKET.num_frames / statistics.median(
        seconds_of(partial(decode_only, item.record.path)) for _ in range(2 * rounds)
    )
    here = bare / PEERS["bare PyAV decode"][0]
    return {
        "v0.0.1, two decodings, clips_per_second, quoted": round(peer, 3),
        "times_v0.0.1": round(clips_per_second / peer, 1),
        "times_v0.0.1_scaled_by_a_bare_decode": round(clips_per_second / (peer * here), 1),
    }


def be_killed(items: list[Item], model: Path, cache: Path, begun: Any, decoded: Any) -> None:
    """Encode, and end without a word as the clip in the middle has begun to be encoded."""
    encode_video = Stub.encode_video

    def encode_one(*given: Any) -> Any:
        begun.value += 1
        if begun.value == NUM_CLIPS // 2 + 1:
            os._exit(9)
        return encode_video(*given)

    def count() -> None:
        with decoded.get_lock():
            decoded.value += 1

    with counted(count), patch.object(Stub, "encode_video", encode_one):
        encode(items, model, cache)


def measure_kills(items: list[Item], model: Path, folder: Path) -> dict[str, Any]:
    """Of a run that is killed while it encodes the clip in the middle: what was done and is done again."""
    spawn = multiprocessing.get_context("spawn")
    encoded_again, decoded_again, decodes_after = [], [], []
    for number in range(NUM_KILLS):
        cache, begun, decoded = folder / f"killed{number}", spawn.Value("i", 0), spawn.Value("i", 0)
        process = spawn.Process(target=be_killed, args=(items, model, cache, begun, decoded))
        process.start()
        process.join()
        assert process.exitcode == 9
        held = len(list((cache / "videos").rglob("*.safetensors")))
        again: list[int] = []
        with counted(lambda again=again: again.append(1)):
            encode(items, model, cache)
        assert held + len(again) == NUM_CLIPS, "what was held is decoded again"
        encoded_again.append(begun.value - 1 - held)
        decoded_again.append(decoded.value - held)
        decodes_after.append(len(again))
    return {
        "kills": NUM_KILLS,
        "whole_clips_encoded_again": encoded_again,
        "decodings_begun_and_made_again": decoded_again,
        "clips_decoded_after_it": decodes_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast clips and captions are encoded.")
    parser.add_argument("--clips", type=Path, help="filmed clips with a metadata.csv, instead of rendered ones")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precompute.json")
    arguments = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    # The encoders stand for those on a GPU, which leave the cores to decoding.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_ltx(folder / "model")
        if arguments.clips:
            items = items_of(arguments.clips, folder / "files.json", window="all")
        else:
            (folder / "clips").mkdir()
            items = rendered_items(folder / "clips")
        rates = measure_rates(items, model, folder, arguments.rounds)
        if not arguments.clips:
            rates |= compare_to_peer(rates["clips_and_captions_per_second"], items[0], arguments.rounds)
        kills = measure_kills(items, model, folder)
    kind = "filmed" if arguments.clips else "rendered"
    sys.argv = [argument if argument != str(arguments.clips) else "FOLDER" for argument in sys.argv]
    machine = describe_machine() | {"load_before": load}
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results |= {"goals": GOALS, kind: {"machine": machine, f"encoding to {BUCKET}": rates, "killed halfway": kills}}
    write_record(arguments.out, results)


if __name__ == "__main__":
    main()
