"""Captions are embedded without their padding where nothing reads it, and nothing that is read changes."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.data.cache import Cache
from finetrainers.encoding import Encoder, Prompt
from finetrainers.engines.single import SingleEngine
from finetrainers.families.base import Family
from finetrainers.text_batches import LENGTH_STEP, TEXTS_AT_ONCE, embed_batch, plan_batches
from finetrainers.types import Bucket, Condition
from tests.families.parity import CPU, inputs_of, random_clip, rates
from tests.families.tiny import TINY

SHORTENED = {"wan-2.1": 512, "hunyuan": 351, "ltx-0.9.5": 256}
"""With the length to which a caption was padded."""
READ = {"ltx-0.9.0": 128, "cogvideox-5b": 40}
"""Models whose padding is read."""
CAPTIONS = ["a red circle", "", "b" * 40, "c d " * 30, "x" * 700, "a blue square stands", "e" * 100, "f" * 31, "g" * 32]


def embedded(family: Family, captions: list[str], embed: Any = embed_batch) -> dict[str, torch.Tensor]:
    encoders = family.load_text_encoders(CPU, torch.float32)
    tokens = family.tokenize(family.load_tokenizers(), captions)
    with torch.no_grad():
        return embed(family, encoders, tokens)


def whole(family: Family, encoders: Any, tokens: Any) -> dict[str, torch.Tensor]:
    """With all padding, as the pipelines have it."""
    return family.embed(encoders, tokens)


@pytest.mark.parametrize("name", SHORTENED)
def test_text_is_what_it_is_with_all_of_its_padding(folders, name):
    """Each group by itself; padding is zeros, where Wan's pipeline has them too."""
    family = TINY[name].open(folders[name])
    groups = plan_batches(family, family.load_tokenizers(), CAPTIONS)
    assert len(groups) > 3
    for group in groups:
        captions = [CAPTIONS[index] for index in group]
        ours, theirs = embedded(family, captions), embedded(family, captions, whole)
        assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
            key: (t.shape, t.dtype) for key, t in theirs.items()
        }
        kept = theirs.pop("prompt_attention_mask", (theirs["prompt_embeds"] != 0).any(-1))
        assert torch.equal(ours.pop("prompt_attention_mask", kept), kept)
        torch.testing.assert_close(ours["prompt_embeds"][kept], theirs["prompt_embeds"][kept], rtol=1e-5, atol=3e-5)
        assert not ours["prompt_embeds"][:, int(kept.sum(1).max()) + LENGTH_STEP :].any()
        for key in ours.keys() - {"prompt_embeds"}:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", SHORTENED)
def test_the_transformer_answers_as_with_all_of_it(folders, name):
    row = TINY[name]
    family, bucket = row.open(folders[name]), Bucket.parse(row.bucket)
    latents, inputs = inputs_of(family, random_clip(bucket), Condition(), prompt="a red circle")
    transformers = family.load_transformers(torch.float32)
    answers = []
    for text in (inputs["text"], embedded(family, ["a red circle"]), embedded(family, ["a blue square stands"])):
        with torch.no_grad():
            timestep = torch.tensor([500.0])
            answers.append(
                family.predict(transformers, latents, timestep, text=text, given=inputs["given"], fps_B=rates(25.0))
            )
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=3e-5)
    assert (answers[0] - answers[2]).abs().max() > 1e-4, "another text is another answer"


@pytest.mark.parametrize("name", READ)
def test_padding_that_is_read_stays(folders, name):
    family = TINY[name].open(folders[name])
    assert family.padded_tokens == ()
    assert plan_batches(family, family.load_tokenizers(), CAPTIONS) == [list(range(8)), [8]]
    ours, theirs = embedded(family, CAPTIONS), embedded(family, CAPTIONS, whole)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor)


@pytest.mark.parametrize("name", [*SHORTENED, *READ])
def test_a_caption_is_embedded_at_a_length_of_its_own(folders, name):
    """Whatever the others, and their order; each once, in batches of one length."""
    family = TINY[name].open(folders[name])
    tokenizers = family.load_tokenizers()
    captions = ["x" * number for number in range(0, 300, 7)]
    draw, batches_of = random.Random(0), {}
    for part in (captions, draw.sample(captions, 30), draw.sample(captions, 9)):
        batches = plan_batches(family, tokenizers, part)
        assert sorted(index for batch in batches for index in batch) == list(range(len(part)))
        assert max(map(len, batches)) <= TEXTS_AT_ONCE
        for batch in batches:
            lengths = {length_of(family, [part[index] for index in batch])}
            lengths |= {length_of(family, [part[index]]) for index in batch}
            assert len(lengths) == 1
            for index in batch:
                assert batches_of.setdefault(part[index], lengths) == lengths


def length_of(family: Family, captions: list[str]) -> int:
    """The length at which captions reach the text encoder together."""
    seen = []

    def embed(encoders: Any, tokens: Any) -> dict[str, torch.Tensor]:
        seen.append(tokens[next(name for name in tokens if name.endswith("input_ids"))].shape[1])
        return {}

    tokens = family.tokenize(family.load_tokenizers(), captions)
    embed_batch(_with(family, embed), {}, tokens)
    return seen[0]


def _with(family: Family, embed: Any) -> Any:
    return SimpleNamespace(
        padded_tokens=family.padded_tokens, text_sees_image=False, embed=embed, blank_text=family.blank_text
    )


def tokens_embedded(name: str, folder: Path, cache: Path, captions: list[str]) -> Counter:
    """How many batches reached the large text encoder, by their shape."""
    shapes: Counter = Counter()
    family = TINY[name].open(folder)
    load = family.load_text_encoders

    def watched(*given: Any) -> Any:
        encoders = load(*given)
        encoders["text_encoder"].register_forward_pre_hook(
            lambda module, args, named: shapes.update([tuple((*args, named.get("input_ids"))[0].shape)]),
            with_kwargs=True,
        )
        return encoders

    family.load_text_encoders = watched  # type: ignore[method-assign]
    progress = nullcontext(SimpleNamespace(advance=lambda n=1: None))
    encoder = Encoder(family, Cache(cache), SingleEngine(), torch.float32, 2, lambda what, total: progress)
    encoder.encode_texts([Prompt(caption) for caption in captions])
    assert not encoder.cache.missing("texts", [encoder.text_key(Prompt(caption)) for caption in captions])
    return shapes


@pytest.mark.parametrize(("name", "length"), [*SHORTENED.items(), *READ.items()])
def test_no_padding_reaches_the_encoder_that_is_not_read(folders, tmp_path, name, length):
    """Nine short captions and one of more than any length, which is 32 tokens or a little more and all of them."""
    captions = [f"word {number}" for number in range(9)]
    template = 95 if name == "hunyuan" else 0
    short = -(-(template + 9) // LENGTH_STEP) * LENGTH_STEP if name in SHORTENED else length
    shapes = tokens_embedded(name, folders[name], tmp_path / "short", captions)
    assert shapes == {(8, short): 1, (1, short): 1}
    shapes = tokens_embedded(name, folders[name], tmp_path / "both", [*captions[:7], "x" * 700])
    assert shapes == ({(7, short): 1, (1, length): 1} if name in SHORTENED else {(8, length): 1})
