"""Data meets family: clips become latents and captions become embeddings, in the cache, each once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch

from finetrainers.background import done_behind, read_ahead
from finetrainers.captions import report_captions
from finetrainers.data.cache import Cache, Kind
from finetrainers.data.clip import read_clip
from finetrainers.data.dataset import Dataset
from finetrainers.data.scan import Item
from finetrainers.engines.base import Engine
from finetrainers.errors import UnusableClip
from finetrainers.families.base import Family
from finetrainers.hashing import digest, generator_for
from finetrainers.memory.exhausted import free, told
from finetrainers.memory.lane import Arrival
from finetrainers.memory.quantized import VERSION as QUANTIZED_VERSION
from finetrainers.text_batches import embed_batch, plan_batches
from finetrainers.text_encoders import load_text_encoders
from finetrainers.types import Clip, Condition, Problem, Sample

logger = logging.getLogger(__name__)

VERSION = 2
"""Raised whenever the same clip and caption would be encoded to other numbers."""

Entry = tuple[Kind, str, dict[str, torch.Tensor]]
"""What is to be written to the cache: its kind, its key and its tensors."""


class Progress(Protocol):
    """What an encoding phase tells about how far it is."""

    def advance(self, n: int = 1) -> None:
        """So many more are done."""


OpenProgress = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Prompt:
    """A text to embed, and the clip whose first frame the text encoder is shown, where it sees one."""

    text: str
    item: Item | None = None


@dataclass
class Encoder:
    """Encodes what the cache lacks. Each encoder is loaded only when something must be encoded, and leaves memory
    before the next comes."""

    family: Family
    cache: Cache
    engine: Engine
    dtype: torch.dtype
    num_workers: int
    progress: OpenProgress
    conditions: Sequence[Condition] = ()
    """What is given of the clips."""
    tokens_only: bool = False
    """Captions become tokens only, for a text encoder that is being trained."""
    weights_format: str | None = None
    """Low precision in which the text encoder is held; None is that of `dtype`."""
    stream_text_encoder: bool = False
    """Layers of text encoders lie on the host, and come to the device when they run."""
    _fingerprints: dict[str, str] = field(default_factory=dict)

    def samples(self, items: Sequence[Item], *, trigger: str) -> list[Sample]:
        """What each item will be called in the cache. Nothing is encoded by asking."""
        return [self._sample(item, trigger) for item in items]

    def text_key(self, prompt: Prompt) -> str:
        """Cache key of a text: the text, the frame that belongs to it, the encoder's files, how its weights are held,
        and nothing else."""
        shown = _clip_facts(prompt.item) if self.family.text_sees_image and prompt.item else None
        made_by = [self._fingerprint("text_encoder"), str(self.dtype), self.tokens_only]
        if self.weights_format is not None:
            made_by += [self.weights_format, QUANTIZED_VERSION]
        return digest(["text", VERSION, self.family.name, made_by, prompt.text, shown])

    def encode_clips(self, items: Sequence[Item], samples: Sequence[Sample]) -> dict[str, str]:
        """Encode the clips and conditions that the cache lacks, each clip decoded once. Returns, by the clip's cache
        key, why it turned out to be unreadable."""
        wanted = dict(zip([sample.video_key for sample in samples], zip(items, samples, strict=True), strict=True))
        conditions = [key for sample in samples for key in sample.condition_keys.values()]
        missing = {*self._missing("videos", wanted), *self._missing("conditions", conditions)}
        due = {key: item for key, (item, sample) in wanted.items() if missing & {key, *sample.condition_keys.values()}}
        logger.info("videos: %d of %d are encoded already", len(wanted) - len(due), len(wanted))
        if not due:
            return {}
        unreadable: dict[str, str] = {}
        advice = ("memory.vae_tiling=true", "data.buckets of fewer frames or smaller pictures")
        with (
            told("encoding videos", self.engine.device, advice=advice),
            self.progress("encoding videos", len(due)) as progress,
        ):
            encoders = self.family.load_video_encoders(self.engine.device, self.dtype)
            done = 0
            with self._writing() as write:
                for number, key, clip in self._read_clips(list(due.items())):
                    if isinstance(clip, UnusableClip):
                        unreadable[key] = str(clip)
                    else:
                        write(self._encode_clip(encoders, clip, wanted[key][1], missing))
                    # Clips are handed out in order, so that their numbers say how far all processes are.
                    progress.advance(number + 1 - done)
                    done = number + 1
            found = self.engine.gather(unreadable)
            progress.advance(len(due) - done)
        del encoders
        free(self.engine.device)
        self._remember("videos", wanted)
        self._remember("conditions", conditions)
        return {key: reason for each in found for key, reason in each.items()}

    def _missing(self, kind: Kind, keys: Iterable[str]) -> list[str]:
        """What the main process finds missing, before any process begins to fill it."""
        found: list[str] = self.engine.gather(self.cache.missing(kind, keys))[0]
        return found

    def _remember(self, kind: Kind, keys: Iterable[str]) -> None:
        """Keep the checksums of what all processes wrote."""
        if self.engine.is_main:
            self.cache.missing(kind, keys)

    def _read_clips(self, wanted: Sequence[tuple[str, Item]]) -> Iterator[tuple[int, str, Clip | UnusableClip]]:
        """This process's clips, decoded by threads ahead of the encoder, in order; each with its number and key."""
        is_pinned = self.engine.device.type == "cuda"

        def read(number: int) -> tuple[int, str, Clip | UnusableClip]:
            key, item = wanted[number]
            return number, key, _read(item, is_pinned=is_pinned)

        jobs = (partial(read, number) for number in self.engine.claim(len(wanted)))
        return read_ahead(jobs, num_workers=self.num_workers, name="decode")

    def _encode_clip(self, encoders: dict[str, Any], clip: Clip, sample: Sample, missing: set[str]) -> list[Entry]:
        entries: list[Entry] = []
        if sample.video_key in missing:
            entries.append(("videos", sample.video_key, self.family.encode_video(encoders, clip.video_FCHW)))
        for condition in self.conditions:
            key = sample.condition_keys.get(str(condition))
            if key in missing and key is not None:
                # Keyed by the clip alone: the cache is shared by runs of any seed.
                generator = generator_for(0, "condition", key)
                encoded = self.family.encode_condition(encoders, clip.video_FCHW, condition, generator)
                entries.append(("conditions", key, encoded))
        return entries

    @contextmanager
    def _writing(self) -> Iterator[Callable[[list[Entry]], None]]:
        """In the block, a thread brings what an encoder made to the cache while the encoder goes on; after the block,
        all of it is there. A kill loses what is being written and what is being encoded, and no more."""
        device = self.engine.device

        def write(entries: list[Entry]) -> None:
            copies: list[Entry] = [
                (kind, key, {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()})
                for kind, key, tensors in entries
            ]
            # The copies are whole only when the device has come this far.
            arrival = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            hand_over(partial(self._write, copies, arrival))

        with done_behind("write") as hand_over:
            yield write

    def _write(self, entries: list[Entry], arrival: Arrival) -> None:
        if arrival is not None:
            arrival.synchronize()
        for kind, key, tensors in entries:
            self.cache.write(kind, key, tensors)

    def encode_texts(self, prompts: Sequence[Prompt]) -> None:
        """Encode the texts that the cache lacks, and say how many are cut off or not understood."""
        wanted = {self.text_key(prompt): prompt for prompt in prompts}
        missing = self._missing("texts", wanted)
        logger.info("texts: %d of %d are encoded already", len(wanted) - len(missing), len(wanted))
        if not missing:
            return
        tokenizers = self.family.load_tokenizers()
        due = [wanted[key] for key in missing]
        texts = [prompt.text for prompt in due]
        report_captions(self.family, tokenizers, texts)
        batches = [[due[index] for index in batch] for batch in plan_batches(self.family, tokenizers, texts)]
        ends = list(accumulate(len(batch) for batch in batches))
        advice = ("memory.stream_text_encoder=true", "memory.text_encoder_weights=int8")
        with (
            told("encoding captions", self.engine.device, advice=advice),
            self.progress("encoding texts", len(missing)) as progress,
        ):
            encoders = self._load_text_encoders(num_loaders=len(batches))
            done = 0
            with self._writing() as write:
                for number, tokens in self._read_texts(tokenizers, batches):
                    write(self._embed(encoders, tokens, batches[number]))
                    progress.advance(ends[number] - done)
                    done = ends[number]
            self.engine.wait()
            progress.advance(len(missing) - done)
        del encoders
        free(self.engine.device)
        self._remember("texts", wanted)

    def _load_text_encoders(self, *, num_loaders: int) -> dict[str, Any]:
        """One process after another, since each copy passes through the host's memory; none where there is no work."""
        encoders: dict[str, Any] = {}
        for turn in range(min(num_loaders, self.engine.world_size)):
            if turn == self.engine.rank and not self.tokens_only:
                encoders = load_text_encoders(
                    self.family,
                    self.engine.device,
                    self.dtype,
                    weights_format=self.weights_format,
                    is_streamed=self.stream_text_encoder,
                )
            self.engine.wait()
        return encoders

    def _read_texts(
        self, tokenizers: dict[str, Any], batches: Sequence[Sequence[Prompt]]
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The tokens of this process's batches, made by a thread ahead of the encoder; each with the batch's number."""

        def tokenize(number: int) -> tuple[int, dict[str, torch.Tensor]]:
            prompts = batches[number]
            images = [_first_frame(prompt.item) for prompt in prompts] if self.family.text_sees_image else None
            return number, self.family.tokenize(tokenizers, [prompt.text for prompt in prompts], images)

        numbers = self.engine.claim(len(batches))
        jobs = (partial(tokenize, number) for number in (numbers if self.engine.rank < len(batches) else ()))
        # A tokenizer may be asked by one thread at a time.
        return read_ahead(jobs, num_workers=min(self.num_workers, 1), name="tokenize")

    @torch.no_grad()
    def _embed(
        self, encoders: dict[str, Any], tokens: dict[str, torch.Tensor], prompts: Sequence[Prompt]
    ) -> list[Entry]:
        embedded = tokens if self.tokens_only else embed_batch(self.family, encoders, tokens)
        return [
            ("texts", self.text_key(prompt), {name: tensor[row] for name, tensor in embedded.items()})
            for row, prompt in enumerate(prompts)
        ]

    def _sample(self, item: Item, trigger: str) -> Sample:
        caption = " ".join(part for part in (trigger, item.record.caption) if part)
        made_by = [self._fingerprint("video_encoder"), str(self.dtype), self.family.vae_tiling]
        made_of = [VERSION, self.family.name, made_by, _clip_facts(item)]
        return Sample(
            name=item.name,
            video_key=digest(["video", *made_of]),
            text_key=self.text_key(Prompt(caption, item)),
            empty_text_key=self.text_key(Prompt("", item)),
            condition_keys={
                str(condition): digest(["condition", str(condition), *made_of])
                for condition in self.conditions
                if item.bucket.num_frames > 1 and self.family.needs_encoding(condition)
            },
            caption=caption,
            bucket=item.bucket,
            fps=item.window.fps or self.family.default_fps,
            num_tokens=self.family.num_tokens(item.bucket),
        )

    def _fingerprint(self, role: str) -> str:
        if role not in self._fingerprints:
            self._fingerprints[role] = self.family.fingerprint(role)
        return self._fingerprints[role]


@dataclass(frozen=True)
class EncodedDataset:
    """What training draws from; every sample and text of it lies in the cache."""

    train: list[Sample]
    held_out: list[Sample]
    unreadable: list[Problem]
    """Clips left out because they could not be decoded."""


def encode_dataset(encoder: Encoder, dataset: Dataset, *, trigger: str, prompts: Sequence[Prompt]) -> EncodedDataset:
    """Encode all clips, then all captions, each clip's empty caption and the given prompts. Clips that turn out to be
    unreadable are left out and named."""
    items = [*dataset.train, *dataset.held_out]
    samples = encoder.samples(items, trigger=trigger)
    unreadable = encoder.encode_clips(items, samples)
    readable = [pair for pair in zip(items, samples, strict=True) if pair[1].video_key not in unreadable]
    captions = [Prompt(text, item) for item, sample in readable for text in (sample.caption, "")]
    encoder.encode_texts([*captions, *prompts])
    train, held_out = samples[: len(dataset.train)], samples[len(dataset.train) :]
    return EncodedDataset(
        [sample for sample in train if sample.video_key not in unreadable],
        [sample for sample in held_out if sample.video_key not in unreadable],
        [Problem(sample.name, unreadable[sample.video_key]) for sample in samples if sample.video_key in unreadable],
    )


def _clip_facts(item: Item) -> list[Any]:
    """What decides the pixels of an item."""
    return [item.digest, item.window.start_seconds, item.window.num_frames, item.window.fps, str(item.bucket)]


def _first_frame(item: Item | None) -> torch.Tensor:
    """The frame that a text encoder is shown, uint8 CHW."""
    assert item is not None
    window = replace(item.window, num_frames=1)
    bucket = replace(item.bucket, num_frames=1)
    return read_clip(item.record, item.media, window, bucket).video_FCHW[0]


def _read(item: Item, *, is_pinned: bool) -> Clip | UnusableClip:
    try:
        clip = read_clip(item.record, item.media, item.window, item.bucket)
    except UnusableClip as error:
        return error
    return replace(clip, video_FCHW=clip.video_FCHW.pin_memory()) if is_pinned else clip
