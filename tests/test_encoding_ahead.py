"""An encoder waits neither for reading nor for the disk; a clip is decoded once, and a kill costs what is in flight."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetrainers import encoding
from finetrainers.data.cache import Cache
from finetrainers.data.clip import read_clip
from finetrainers.data.dataset import Dataset
from finetrainers.demo.clips import render_clips
from finetrainers.encoding import Encoder, Prompt, encode_dataset
from tests.counted import Counts, counting, encoded, items_of
from tests.end_to_end.runs import SERVER
from tests.families.tiny import TINY

NUM_CLIPS = 6
NUM_WORKERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["ltx-0.9.5"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return render_clips(folder, NUM_CLIPS, num_frames=9, height=64, width=96, fps=16.0).parent


def encode(encoder: Encoder, clips: Path, index: Path) -> None:
    items = items_of(clips, index)
    encode_dataset(encoder, Dataset(items, [], [], len(items)), trigger="", prompts=())


def test_the_next_clip_is_encoded_while_the_last_one_is_written(model, clips, tmp_path, monkeypatch):
    encoder = counting(Counts(), model, tmp_path / "cache")
    family: Any = encoder.family
    encode_video, write = family.encode_video, encoder.cache.write
    began, writers = [threading.Event() for _ in range(NUM_CLIPS + 1)], set()
    began[-1].set()

    def encode_one(*given: Any) -> Any:
        next(event for event in began if not event.is_set()).set()
        return encode_video(*given)

    written = []

    def write_late(kind: Any, *given: Any) -> None:
        if kind == "videos":
            writers.add(threading.get_ident())
            written.append(kind)
            assert began[len(written)].wait(20), "the encoder waits for the cache"
        write(kind, *given)

    monkeypatch.setattr(family, "encode_video", encode_one)
    monkeypatch.setattr(encoder.cache, "write", write_late)
    encode(encoder, clips, tmp_path / "files.json")
    assert len(written) == NUM_CLIPS and writers.isdisjoint({threading.get_ident()})


def test_the_next_captions_become_tokens_while_the_last_are_embedded(model, tmp_path, monkeypatch):
    encoder = counting(Counts(), model, tmp_path / "cache")
    family: Any = encoder.family
    tokenize, embed = family.tokenize, family.embed
    is_ahead = threading.Event()
    embedded: list[int] = []

    def tokenize_some(tokenizers: Any, captions: Any, images: Any = None) -> Any:
        if threading.current_thread() is not threading.main_thread() and len(captions) < 8:
            is_ahead.set()
        return tokenize(tokenizers, captions, images)

    def embed_some(encoders: Any, tokens: Any) -> Any:
        assert is_ahead.wait(20), "the second batch has no tokens yet"
        embedded.append(len(tokens["input_ids"]))
        return embed(encoders, tokens)

    monkeypatch.setattr(family, "tokenize", tokenize_some)
    monkeypatch.setattr(family, "embed", embed_some)
    encoder.encode_texts([Prompt(f"word {number}") for number in range(9)])
    assert embedded == [8, 1]


@pytest.mark.parametrize("kind", ["videos", "texts"])
def test_a_cache_that_cannot_be_written_ends_the_run(model, clips, tmp_path, monkeypatch, kind):
    """Also when it is the last entry that fails; what was written stays, whole."""
    for failing in (2, NUM_CLIPS):
        encoder, counts = counting(Counts(), model, tmp_path / str(failing)), {"videos": 0, "texts": 0}
        write = encoder.cache.write

        def write_some(
            name: Any, *given: Any, counts: Any = counts, write: Any = write, failing: int = failing
        ) -> None:
            counts[name] += 1
            if name == kind and counts[name] == failing:
                raise OSError("no space left on device")
            write(name, *given)

        monkeypatch.setattr(encoder.cache, "write", write_some)
        with pytest.raises(OSError, match="no space left"):
            encode(encoder, clips, tmp_path / "files.json")
        held = list((tmp_path / str(failing) / kind).rglob("*"))
        assert len([path for path in held if path.suffix == ".safetensors"]) == failing - 1
        assert not [path for path in held if path.suffix == ".tmp"]


def test_neither_threads_nor_order_change_a_number(model, clips, tmp_path):
    found = []
    for num_workers, step in ((0, 1), (1, 1), (3, -1)):
        cache = tmp_path / f"{num_workers}"
        items = items_of(clips, tmp_path / "files.json")[::step]
        encoded(items, model, cache, num_workers=num_workers)
        found.append({path.name: load_file(path) for path in sorted(cache.rglob("*.safetensors"))})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, tensors in found[0].items():
            for part, tensor in tensors.items():
                assert torch.equal(other[name][part], tensor), (name, part)


def killed_at(number: int, model: Path, clips: Path, cache: Path) -> None:
    """Encode clips, and be gone without a word as encoding the clip of this number begins."""
    encoder = counting(Counts(), model, cache, num_workers=NUM_WORKERS)
    family: Any = encoder.family
    encode_video, begun = family.encode_video, []

    def encode_one(*given: Any) -> Any:
        begun.append(True)
        if len(begun) == number:
            os._exit(9)
        return encode_video(*given)

    family.encode_video = encode_one
    encode(encoder, clips, cache.parent / "files.json")


@pytest.mark.parametrize("number", [1, 2, 4, NUM_CLIPS])
def test_a_kill_costs_what_is_in_flight(model, clips, tmp_path, monkeypatch, number):
    """The clip that is encoded and the one that is written; all others are decoded once, before it or after it."""
    process = SERVER.Process(target=killed_at, args=(number, model, clips, tmp_path / "cache"))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    held = len(list((tmp_path / "cache").rglob("*.safetensors")))
    assert number - 2 <= held <= number - 1
    decoded: list[str] = []

    def read(record: Any, *given: Any) -> Any:
        decoded.append(record.name)
        return read_clip(record, *given)

    monkeypatch.setattr(encoding, "read_clip", read)
    data, counts = encoded(items_of(clips, tmp_path / "files.json"), model, tmp_path / "cache")
    assert counts.videos == len(decoded) == len(set(decoded)) == NUM_CLIPS - held
    keys = [sample.video_key for sample in data.train + data.held_out]
    assert Cache(tmp_path / "cache").missing("videos", keys) == []
