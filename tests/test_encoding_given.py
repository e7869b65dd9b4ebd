"""What is encoded of given frames, and of texts that see one: once, only where needed, under names of its own."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetrainers import encoding
from finetrainers.config.schema import ModelConfig
from finetrainers.data.cache import Cache
from finetrainers.data.clip import read_clip
from finetrainers.data.dataset import Dataset
from finetrainers.data.scan import Item
from finetrainers.demo.clips import render_clips
from finetrainers.encoding import Encoder, Prompt, encode_dataset
from finetrainers.engines.single import SingleEngine
from finetrainers.families.ltx import LTXVideo
from finetrainers.types import Bucket, Condition, Sample
from tests.counted import Counts, counting, encoded, items_of
from tests.families.tiny import TINY

NUM_CLIPS = 3
CPU = torch.device("cpu")
NEEDED = "first_last"
"""The one condition for which LTX-Video needs more than the clip's latents."""
IMAGE_TO_VIDEO = {"task": "image-to-video", "conditions": ("none", "first", NEEDED)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["ltx-0.9.5-i2v"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return render_clips(folder, NUM_CLIPS, num_frames=18, height=64, width=96, fps=16.0).parent


@pytest.fixture
def items(clips: Path, tmp_path: Path) -> list[Item]:
    return items_of(clips, tmp_path / "files.json")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How often each clip was decoded, by its caption."""
    found: Counter = Counter()

    def read(record: Any, *given: Any) -> Any:
        found[record.caption] += 1
        return read_clip(record, *given)

    monkeypatch.setattr(encoding, "read_clip", read)
    return found


def test_conditions_are_encoded_once_and_only_where_they_are_needed(model, items, decoded, tmp_path):
    data, counts = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    assert (counts.videos, counts.conditions, counts.loads) == (NUM_CLIPS, NUM_CLIPS, 1)
    assert list(decoded.values()) == [1] * NUM_CLIPS, "for its video and its condition together"
    samples = data.train + data.held_out
    assert all(sample.condition_keys.keys() == {NEEDED} for sample in samples)
    keys = {key for sample in samples for key in (sample.video_key, *sample.condition_keys.values())}
    assert len(keys) == 2 * NUM_CLIPS
    again, counts = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    assert (counts.videos, counts.conditions, counts.loads, counts.texts) == (0, 0, 0, 0)
    assert again == data and sum(decoded.values()) == NUM_CLIPS


def test_what_lies_in_the_cache_is_the_last_frame(model, items, tmp_path):
    data, _ = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    encoder = counting(Counts(), model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    vae = encoder.family.load_video_encoders(CPU, torch.float32)
    for sample, item in zip(data.train + data.held_out, items, strict=True):
        clip = read_clip(item.record, item.media, item.window, item.bucket)
        expected = encoder.family.encode_video(vae, clip.video_FCHW[-1:])
        entry = encoder.cache.read("conditions", sample.condition_keys[NEEDED])
        assert entry.keys() == expected.keys() and tuple(entry["mean"].shape) == (8, 1, 2, 3)
        for name, tensor in expected.items():
            torch.testing.assert_close(entry[name], tensor, rtol=1e-4, atol=1e-4)


def remove(cache: Cache, sample: Sample, *kinds: str) -> None:
    keys = {"videos": sample.video_key, "conditions": sample.condition_keys[NEEDED]}
    for kind in kinds:
        cache.path(kind, keys[kind]).unlink()


MISSING: dict[str, tuple[list[tuple[int, tuple[str, ...]]], int, int]] = {
    "a video": ([(0, ("videos",))], 1, 0),
    "a condition": ([(1, ("conditions",))], 0, 1),
    "both of one clip": ([(2, ("videos", "conditions"))], 1, 1),
    "one of each of two": ([(0, ("videos",)), (1, ("conditions",))], 1, 1),
}


@pytest.mark.parametrize("case", MISSING)
def test_only_what_is_missing_is_encoded(model, items, decoded, tmp_path, case):
    removed, num_videos, num_conditions = MISSING[case]
    data, _ = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    samples, cache = data.train + data.held_out, Cache(tmp_path / "cache")
    before = {path: path.read_bytes() for path in sorted(cache.root.rglob("*.safetensors"))}
    for index, kinds in removed:
        remove(cache, samples[index], *kinds)
    decoded.clear()
    _, counts = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    assert (counts.videos, counts.conditions, counts.loads) == (num_videos, num_conditions, 1)
    assert decoded == {items[index].record.caption: 1 for index, _ in removed}
    assert {path: path.read_bytes() for path in sorted(cache.root.rglob("*.safetensors"))} == before


def test_a_condition_that_comes_later_leaves_the_videos(model, items, tmp_path):
    """And one that goes leaves what lies there."""
    given = IMAGE_TO_VIDEO | {"conditions": ("first",)}
    data, counts = encoded(items, model, tmp_path / "cache", **given)
    assert (counts.videos, counts.conditions) == (NUM_CLIPS, 0)
    assert all(sample.condition_keys == {} for sample in data.train)
    more, counts = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    assert (counts.videos, counts.conditions, counts.texts) == (0, NUM_CLIPS, 0)
    assert [sample.video_key for sample in more.train] == [sample.video_key for sample in data.train]
    _, counts = encoded(items, model, tmp_path / "cache", **given)
    assert (counts.videos, counts.conditions, counts.loads) == (0, 0, 0)


def test_text_to_video_shares_what_image_to_video_encoded(model, items, tmp_path):
    encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    _, counts = encoded(items, model, tmp_path / "cache", task="text-to-video")
    assert (counts.videos, counts.conditions, counts.texts, counts.loads) == (0, 0, 0, 0)


def test_a_still_image_has_no_condition(model, items, tmp_path):
    still = [replace(item, bucket=Bucket(1, 64, 96), window=replace(item.window, num_frames=1)) for item in items]
    data, counts = encoded(still, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    assert (counts.videos, counts.conditions) == (NUM_CLIPS, 0)
    assert all(sample.condition_keys == {} for sample in data.train)


def test_a_clip_that_cannot_be_decoded_leaves_no_condition(model, clips, items, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(items[0].record.path.read_bytes()[:600])
    items = [replace(items[0], record=replace(items[0].record, path=broken)), *items[1:]]
    data, counts = encoded(items, model, tmp_path / "cache", **IMAGE_TO_VIDEO)
    assert [problem.name for problem in data.unreadable] == [items[0].name]
    assert (counts.videos, counts.conditions) == (NUM_CLIPS - 1, NUM_CLIPS - 1)


class Drawing(LTXVideo):
    """Needs something of every given frame, and draws for it."""

    def needs_encoding(self, condition: Condition) -> bool:
        return not condition.is_none

    def encode_condition(
        self, encoders: Any, video_FCHW: torch.Tensor, condition: Condition, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {"drawn": torch.rand(4, generator=generator), "frame": video_FCHW[-condition.num_last].float()}


class Seeing(LTXVideo):
    """Its text encoder is shown the first frame."""

    text_sees_image = True

    def tokenize(self, tokenizers: Any, captions: Any, images: Any = None) -> dict[str, torch.Tensor]:
        assert len(images) == len(captions)
        return super().tokenize(tokenizers, captions) | {"seen": torch.stack(images)}

    def embed(self, encoders: Any, tokens: Any) -> dict[str, torch.Tensor]:
        return super().embed(encoders, tokens) | {"seen": tokens["seen"]}


def encoder_of(kind: type[LTXVideo], model: Path, cache: Path, **options: Any) -> Encoder:
    family = kind(model, ModelConfig(path=str(model), task="image-to-video"))
    return Encoder(family, Cache(cache), SingleEngine(), torch.float32, 2, Counts().progress, **options)


def test_what_is_drawn_for_a_condition_belongs_to_the_clip(model, items, tmp_path):
    """Whatever the order and the other clips; another draw for another clip and another condition."""
    conditions = [Condition.parse(text) for text in ("none", "first", "first_last")]
    draws: list[dict[str, list[float]]] = []
    for number, some in enumerate((items, items[::-1], items[1:])):
        encoder = encoder_of(Drawing, model, tmp_path / str(number), conditions=conditions)
        data = encode_dataset(encoder, Dataset(some, [], [], len(some)), trigger="", prompts=())
        keys = [key for sample in data.train for key in sample.condition_keys.values()]
        assert all(sample.condition_keys.keys() == {"first", "first_last"} for sample in data.train)
        draws.append({key: encoder.cache.read("conditions", key)["drawn"].tolist() for key in keys})
    assert draws[0] == draws[1] and draws[0].items() > draws[2].items()
    assert len({tuple(draw) for draw in draws[0].values()}) == len(draws[0]) == 2 * NUM_CLIPS


def test_a_text_that_sees_a_frame_belongs_to_the_clip(model, items, tmp_path):
    """The same caption, and the empty one, are another text for every clip; each is shown its own first frame."""
    items = [replace(item, record=replace(item.record, caption="the same")) for item in items]
    encoder = encoder_of(Seeing, model, tmp_path / "cache")
    scene = Prompt("a scene", items[1])
    data = encode_dataset(encoder, Dataset(items, [], [], len(items)), trigger="", prompts=[scene])
    keys = [key for sample in data.train for key in (sample.text_key, sample.empty_text_key)]
    assert len({*keys, encoder.text_key(scene)}) == 2 * NUM_CLIPS + 1
    for sample, item in zip(data.train, items, strict=True):
        frame = read_clip(item.record, item.media, item.window, item.bucket).video_FCHW[0]
        for key in (sample.text_key, sample.empty_text_key):
            assert torch.equal(encoder.cache.read("texts", key)["seen"], frame)
    frame = read_clip(items[1].record, items[1].media, items[1].window, items[1].bucket).video_FCHW[0]
    assert torch.equal(encoder.cache.read("texts", encoder.text_key(scene))["seen"], frame)
    moved = replace(items[0], window=replace(items[0].window, start_seconds=0.5))
    smaller = replace(items[0], bucket=Bucket(9, 32, 64))
    asked = {encoder.text_key(Prompt("the same", item)) for item in (items[0], moved, smaller)}
    assert len(asked) == 3, "another part or another size shows another frame"


def test_a_text_that_sees_nothing_is_every_clips(model, items, tmp_path):
    encoder = encoder_of(LTXVideo, model, tmp_path / "cache")
    assert len({encoder.text_key(Prompt("the same", item)) for item in (None, *items)}) == 1


def test_tokens_alone_are_kept_for_a_text_encoder_that_is_trained(model, items, tmp_path, monkeypatch):
    """No text encoder is loaded, and nothing is mistaken for an embedding of the same caption."""
    monkeypatch.setattr(LTXVideo, "load_text_encoders", lambda *given: pytest.fail("a text encoder was loaded"))
    data, counts = encoded(items, model, tmp_path / "cache", tokens_only=True)
    assert counts.texts == NUM_CLIPS + 1
    encoder = counting(Counts(), model, tmp_path / "cache", tokens_only=True)
    for sample in data.train:
        tokens = encoder.family.tokenize(encoder.family.load_tokenizers(), [sample.caption])
        entry = encoder.cache.read("texts", sample.text_key)
        assert entry.keys() == tokens.keys() == {"input_ids", "attention_mask"}
        assert all(torch.equal(entry[name], tensor[0]) for name, tensor in tokens.items())
    embedding = counting(Counts(), model, tmp_path / "cache")
    assert {s.text_key for s in embedding.samples(items, trigger="")}.isdisjoint(s.text_key for s in data.train)
    assert [s.video_key for s in embedding.samples(items[:-1], trigger="")] == [s.video_key for s in data.train]
