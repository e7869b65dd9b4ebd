"""Each clip and caption is encoded once, under a name made of what made it; damage and kills leave nothing half."""

import gc
import logging
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetrainers.data.cache import Cache
from finetrainers.data.dataset import Dataset
from finetrainers.data.scan import Item
from finetrainers.demo.clips import render_clips
from finetrainers.encoding import Prompt, encode_dataset
from finetrainers.types import Record
from tests.counted import BUCKET, Counts, counting, encoded, items_of
from tests.end_to_end.runs import run, start, write_config
from tests.families.tiny import TINY

NUM_CLIPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return render_clips(folder, NUM_CLIPS, num_frames=18, height=64, width=96, fps=16.0).parent


@pytest.fixture(scope="module")
def full(model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which all of the clips are encoded, in fp32; to be copied, not written to."""
    folder = tmp_path_factory.mktemp("full")
    encoded(items_of(clips, folder / "files.json"), model, folder / "cache")
    return folder / "cache"


def recaptioned(items: list[Item], change: Callable[[Record], Record]) -> list[Item]:
    return [replace(items[0], record=change(items[0].record)), *items[1:]]


def test_each_clip_and_caption_is_encoded_once(model, clips, tmp_path):
    items = items_of(clips, tmp_path / "files.json")
    data, counts = encoded(items, model, tmp_path / "cache", prompts=("a prompt", items[0].record.caption))
    assert (counts.videos, counts.texts, counts.loads) == (NUM_CLIPS, NUM_CLIPS + 2, 1), "a prompt and the empty one"
    assert [sample.name for sample in data.train + data.held_out] == [item.name for item in items]
    assert len(data.held_out) == 1 and data.unreadable == []
    again, counts = encoded(items, model, tmp_path / "cache", prompts=("a prompt",))
    assert (counts.videos, counts.texts, counts.loads) == (0, 0, 0), "nor is an encoder loaded"
    assert again == data


def test_what_lies_in_the_cache_is_what_the_family_made(model, clips, tmp_path):
    items = items_of(clips, tmp_path / "files.json")
    counts = Counts()
    encoder = counting(counts, model, tmp_path / "cache")
    data = encode_dataset(encoder, Dataset(items, [], [], len(items)), trigger="", prompts=())
    family = encoder.family
    texts = family.load_text_encoders(encoder.engine.device, encoder.dtype)

    def embed(caption: str) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            batch = family.embed(texts, family.tokenize(family.load_tokenizers(), [caption]))
        return {name: tensor[0] for name, tensor in batch.items()}

    for sample, item in zip(data.train, items, strict=True):
        video = encoder.cache.read("videos", sample.video_key)
        assert video["mean"].shape == video["logvar"].shape == (8, 2, 2, 3)
        assert video["shift"].dtype == video["scale"].dtype == torch.float32
        expected = embed(item.record.caption)
        text = encoder.cache.read("texts", sample.text_key)
        assert text.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(text[name], tensor, rtol=1e-4, atol=1e-5)
        assert (sample.fps, sample.num_tokens, sample.bucket) == (16.0, 2 * 2 * 3, BUCKET)
    assert len({tuple(encoder.cache.read("videos", s.video_key)["mean"].flatten().tolist()) for s in data.train}) == 4
    for key in {encoder.text_key(Prompt("")), *(sample.empty_text_key for sample in data.train)}:
        torch.testing.assert_close(encoder.cache.read("texts", key), embed(""))


def change_weights(model: Path, part: str) -> None:
    file = next((model / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, file, metadata={"format": "pt"})


ALL_TEXTS = NUM_CLIPS + 1
CHANGES: dict[str, tuple[dict[str, Any], int, int]] = {
    "nothing": ({}, 0, 0),
    "a caption": ({"caption": "another caption"}, 0, 1),
    "a caption that another clip has": ({"caption": "same"}, 0, 0),
    "the trigger": ({"trigger": "BW_STYLE"}, 0, NUM_CLIPS),
    "the VAE's weights": ({"part": "vae"}, NUM_CLIPS, 0),
    "the text encoder's weights": ({"part": "text_encoder"}, 0, ALL_TEXTS),
    "the transformer's weights": ({"part": "transformer"}, 0, 0),
    "the type": ({"dtype": torch.bfloat16}, NUM_CLIPS, ALL_TEXTS),
    "tiling": ({"vae_tiling": True}, NUM_CLIPS, 0),
    "the window": ({"window": "all"}, NUM_CLIPS, 0),
    "the number of threads": ({"num_workers": 0}, 0, 0),
    "the order": ({"order": -1}, 0, 0),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_encoded_again(model, clips, full, tmp_path, case):
    """After a change of one thing; eighteen frames hold the window of nine twice."""
    options, num_videos, num_texts = CHANGES[case]
    given = dict(options)
    items = items_of(clips, tmp_path / "files.json")
    shutil.copytree(full, tmp_path / "cache")
    if caption := given.pop("caption", None):
        caption = items[1].record.caption if caption == "same" else caption
        items = recaptioned(items, lambda record: replace(record, caption=caption))
    if part := given.pop("part", None):
        model = shutil.copytree(model, tmp_path / "model")
        change_weights(model, part)
    if window := given.pop("window", None):
        items = items_of(clips, tmp_path / "files.json", window=window)
    items = items[:: given.pop("order", 1)]
    data, counts = encoded(items, model, tmp_path / "cache", **given)
    assert (counts.videos, counts.texts) == (num_videos, num_texts)
    assert len(data.train + data.held_out) == len(items)


def test_keys_depend_on_content_alone(model, clips, tmp_path):
    """Not on the file's name or place, the order, the split, the model's place, or the encoder that is asked."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in clips.glob("*.mp4"):
        shutil.copy(path, moved / f"renamed-{path.name}")
    here = items_of(clips, tmp_path / "a.json")
    there = [
        replace(item, record=replace(item.record, path=moved / f"renamed-{item.name}", name="x"), name="x")
        for item in reversed(here)
    ]
    other_model = shutil.copytree(model, tmp_path / "model")
    one = counting(Counts(), model, tmp_path / "cache").samples(here, trigger="T")
    other = counting(Counts(), other_model, tmp_path / "elsewhere").samples(there, trigger="T")
    assert [s.video_key for s in one] == [s.video_key for s in reversed(other)]
    assert [s.text_key for s in one] == [s.text_key for s in reversed(other)]
    assert len({s.video_key for s in one}) == NUM_CLIPS
    assert [s.caption for s in one] == [f"T {item.record.caption}" for item in here]
    assert not (tmp_path / "cache").exists(), "asking for names encodes nothing"


def test_a_trigger_alone_is_a_caption(model, clips, tmp_path):
    items = items_of(clips, tmp_path / "files.json")
    items = recaptioned(items, lambda record: replace(record, caption=""))
    encoder = counting(Counts(), model, tmp_path / "cache")
    assert encoder.samples(items, trigger="T")[0].caption == "T"
    assert encoder.samples(items, trigger="")[0].text_key == encoder.text_key(Prompt(""))


def test_encoders_leave_memory(model, clips, tmp_path):
    """The VAE before the text encoder comes, and the text encoder at the end."""
    items = items_of(clips, tmp_path / "files.json")
    encoder = counting(Counts(), model, tmp_path / "cache")
    family: Any = encoder.family
    alive: dict[str, weakref.ref] = {}
    load_vae, load_texts = family.load_video_encoders, family.load_text_encoders

    def watched_vae(*given: Any) -> Any:
        encoders = load_vae(*given)
        alive["vae"] = weakref.ref(encoders["vae"])
        return encoders

    def watched_texts(*given: Any) -> Any:
        assert alive["vae"]() is None, "two encoders in memory at once"
        encoders = load_texts(*given)
        alive["text"] = weakref.ref(encoders["text_encoder"])
        return encoders

    family.load_video_encoders, family.load_text_encoders = watched_vae, watched_texts
    gc.disable()
    try:
        encode_dataset(encoder, Dataset(items, [], [], len(items)), trigger="", prompts=())
    finally:
        gc.enable()
    assert alive["vae"]() is None and alive["text"]() is None


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_clip_that_cannot_be_decoded_is_left_out(model, clips, tmp_path, num_workers):
    """Its header was fine when it was looked at; a clip of the same name in another source stays."""
    folders = [shutil.copytree(clips, tmp_path / name) for name in ("one", "other")]
    for path in folders[1].glob("*.mp4"):
        path.write_bytes(path.read_bytes() + b"\0" * 8)
    items = [item for folder in folders for item in items_of(folder, tmp_path / "files.json")]
    assert len({item.digest for item in items}) == 2 * NUM_CLIPS
    cut_short(items[1].record.path)
    data, counts = encoded(items, model, tmp_path / "cache", num_workers=num_workers)
    assert [problem.name for problem in data.unreadable] == [items[1].name]
    assert "cannot be read" in data.unreadable[0].reason
    assert len(data.train) == 2 * NUM_CLIPS - 2 and len(data.held_out) == 1
    assert items[1].name in [sample.name for sample in data.train + data.held_out], "the other's clip of that name"
    assert counts.videos == 2 * NUM_CLIPS - 1
    cache = Cache(tmp_path / "cache")
    assert cache.missing("videos", [sample.video_key for sample in data.train + data.held_out]) == []


def test_copies_of_an_undecodable_clip_are_left_out_together(model, clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    items = items_of(folder, tmp_path / "files.json")
    copy = replace(items[0], name="copy.mp4", record=replace(items[0].record, name="copy.mp4"))
    cut_short(items[0].record.path)
    data, _ = encoded([*items, copy], model, tmp_path / "cache")
    assert [problem.name for problem in data.unreadable] == [items[0].name, "copy.mp4"]
    assert [sample.name for sample in data.train] == [item.name for item in items[1:]]
    assert data.held_out == []


def test_cut_captions_are_said(model, clips, full, tmp_path, caplog):
    items = items_of(clips, tmp_path / "files.json")
    shutil.copytree(full, tmp_path / "cache")
    longest = "x" * 126
    items = recaptioned(items, lambda record: replace(record, caption=longest))
    with caplog.at_level(logging.WARNING):
        encoded(items, model, tmp_path / "cache")
    assert not caplog.records, "126 letters, the word's beginning and the end of the text are 128 tokens"
    items = recaptioned(items, lambda record: replace(record, caption=longest + "y"))
    with caplog.at_level(logging.WARNING):
        encoded(items, model, tmp_path / "cache")
    (record,) = caplog.records
    assert "1 of 1 captions are longer than the 128 tokens" in record.getMessage()
    assert record.getMessage().endswith("the first being: " + "x" * 80)


def test_a_damaged_entry_is_encoded_again(model, clips, full, tmp_path, caplog):
    items = items_of(clips, tmp_path / "files.json")
    shutil.copytree(full, tmp_path / "cache")
    data, counts = encoded(items, model, tmp_path / "cache")
    assert (counts.videos, counts.texts) == (0, 0), "a copied cache is as good"
    cache = Cache(tmp_path / "cache")
    whole = {name: tensor.clone() for name, tensor in cache.read("videos", data.train[0].video_key).items()}
    path = cache.path("videos", data.train[0].video_key)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        _, counts = encoded(items, model, tmp_path / "cache")
    assert (counts.videos, counts.texts) == (1, 0)
    assert "damaged and will be encoded again" in caplog.text
    for name, tensor in Cache(tmp_path / "cache").read("videos", data.train[0].video_key).items():
        torch.testing.assert_close(tensor, whole[name])


def entries(cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every entry, by name; fails on a torn one."""
    return {path.relative_to(cache).as_posix(): load_file(path) for path in sorted(cache.rglob("*.safetensors"))}


def assert_same_bytes(some: dict[str, dict[str, torch.Tensor]], whole: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in some.items():
        assert tensors.keys() == whole[name].keys()
        for part, tensor in tensors.items():
            expected = whole[name][part]
            assert tensor.dtype == expected.dtype and tensor.view(-1).view(torch.uint8).equal(
                expected.view(-1).view(torch.uint8)
            ), (name, part)


def kill_while_encoding(arguments: list[Any], cache: Path, log: Path, draw: random.Random, num_entries: int) -> int:
    """SIGKILL as the cache comes to hold a random number of entries more. Returns how many it holds, or -1 when the
    command ended before."""
    held = len(list(cache.rglob("*.safetensors")))
    wanted = held + draw.randrange(max(1, min(6, num_entries - held)))
    started = start(arguments, log)
    deadline = time.monotonic() + 60
    while started.process.is_alive() and time.monotonic() < deadline:
        if len(list(cache.rglob("*.safetensors"))) >= wanted:
            return len(list(cache.rglob("*.safetensors"))) if started.kill_after(draw.uniform(0, 0.03)) else -1
    assert started.end() == 0, started.said()
    return -1


def killed_precompute(model: Path, tmp_path: Path, *, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    clips = render_clips(tmp_path / "clips", 10, num_frames=9, height=64, width=96, fps=16.0).parent
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips), "buckets": [str(BUCKET)], "num_workers": 2},
        training={"precision": "fp32"},
        validation={"every": 0},
        output=str(tmp_path / "run"),
    )
    code, said = run(["precompute", config, f"data.cache={tmp_path / 'whole'}"], tmp_path / "log")
    assert code == 0, said
    whole = entries(tmp_path / "whole")
    assert len(whole) == 10 + 11, "clips, captions and the empty one"
    cache, hit, moments = tmp_path / "killed", 0, []
    arguments = ["precompute", config, f"data.cache={cache}"]
    for _ in range(10 * kills):
        held = kill_while_encoding(arguments, cache, tmp_path / "log", draw, len(whole))
        assert_same_bytes(entries(cache), whole)
        hit += held >= 0
        moments.append(held)
        if hit == kills:
            break
        if held in (-1, len(whole)):
            shutil.rmtree(cache)
    assert hit == kills, moments
    (cache / "videos").mkdir(parents=True, exist_ok=True)  # a kill may come before the first clip
    (cache / "videos" / ".abc.tmp").write_bytes(b"half")
    code, said = run(arguments, tmp_path / "log")
    assert code == 0, said
    killed = entries(cache)
    assert killed.keys() == whole.keys()
    assert_same_bytes(killed, whole)
    names = {path.name for path in cache.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".tmp")}
    assert names == {"whole.json", "files.json"}


def test_killed_at_six_random_moments(model, tmp_path):
    killed_precompute(model, tmp_path, kills=6, seed=int(time.time()))


@pytest.mark.slow
def test_killed_at_twenty_random_moments(model, tmp_path):
    killed_precompute(model, tmp_path, kills=20, seed=int(time.time()))


def test_interrupted_precompute_says_so_by_its_exit_code(model, clips, tmp_path):
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips), "buckets": [str(BUCKET)]},
        output=str(tmp_path / "run"),
    )
    started = start(["precompute", config], tmp_path / "log")
    started.signal_when(signal.SIGTERM, tmp_path / "run" / "memory.jsonl")
    assert started.end() in (0, 128 + signal.SIGTERM), started.said()
    assert "Traceback" not in started.said()
