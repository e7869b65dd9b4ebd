"""Data meets family: clips become latents and captions become embeddings, in the cache, each once."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from finetrainers.data.cache import Cache
from finetrainers.data.clip import read_clip
from finetrainers.data.dataset import Dataset
from finetrainers.data.scan import Item
from finetrainers.errors import UnusableClip
from finetrainers.families.base import Family
from finetrainers.hashing import digest
from finetrainers.types import Clip, Problem, Sample

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the same clip and caption would be encoded to other numbers."""
_TEXTS_AT_ONCE = 8


class Progress(Protocol):
    """What an encoding phase tells about how far it is."""

    def advance(self, n: int = 1) -> None:
        """So many more are done."""


OpenProgress = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass
class Encoder:
    """Encodes what the cache lacks. Each encoder is loaded only when something must be encoded, and leaves memory
    before the next comes."""

    family: Family
    cache: Cache
    device: torch.device
    dtype: torch.dtype
    num_workers: int
    progress: OpenProgress
    _fingerprints: dict[str, str] = field(default_factory=dict)

    def samples(self, items: Sequence[Item], *, trigger: str) -> list[Sample]:
        """What each item will be called in the cache. Nothing is encoded by asking."""
        return [self._sample(item, trigger) for item in items]

    def text_key(self, caption: str) -> str:
        """Cache key of a caption's embedding: the text, the encoder's files, its type, and nothing else."""
        made_by = [self._fingerprint("text_encoder"), self._fingerprint("tokenizer"), str(self.dtype)]
        return digest(["text", VERSION, self.family.name, made_by, caption])

    def encode_videos(self, items: Sequence[Item], samples: Sequence[Sample]) -> dict[str, str]:
        """Encode the clips that the cache lacks. Returns, by cache key, why a clip turned out to be unreadable."""
        wanted = dict(zip([sample.video_key for sample in samples], items, strict=True))
        missing = self.cache.missing("videos", wanted)
        logger.info("videos: %d of %d are encoded already", len(wanted) - len(missing), len(wanted))
        unreadable: dict[str, str] = {}
        if not missing:
            return unreadable
        vae = self.family.load_video_encoder(self.device, self.dtype)
        with self.progress("encoding videos", len(missing)) as progress:
            for key, clip in self._read_ahead([(key, wanted[key]) for key in missing]):
                if isinstance(clip, UnusableClip):
                    unreadable[key] = str(clip)
                else:
                    self.cache.write("videos", key, self.family.encode_video(vae, clip.video_FCHW))
                progress.advance()
        self.cache.remember()
        del vae
        _free(self.device)
        return unreadable

    def encode_texts(self, captions: Sequence[str]) -> None:
        """Encode the captions that the cache lacks, and say how many are cut off at the model's length."""
        wanted = {self.text_key(caption): caption for caption in captions}
        missing = self.cache.missing("texts", wanted)
        logger.info("texts: %d of %d are encoded already", len(wanted) - len(missing), len(wanted))
        if not missing:
            return
        encoders = self.family.load_text_encoder(self.device, self.dtype)
        self._report_cut_captions(encoders, [wanted[key] for key in missing])
        with self.progress("encoding texts", len(missing)) as progress:
            for start in range(0, len(missing), _TEXTS_AT_ONCE):
                keys = missing[start : start + _TEXTS_AT_ONCE]
                encoded = self.family.encode_text(encoders, [wanted[key] for key in keys])
                for key, tensors in zip(keys, encoded, strict=True):
                    self.cache.write("texts", key, tensors)
                progress.advance(len(keys))
        self.cache.remember()
        del encoders
        _free(self.device)

    def _sample(self, item: Item, trigger: str) -> Sample:
        caption = " ".join(part for part in (trigger, item.record.caption) if part)
        made_of = [item.digest, item.window.start_seconds, item.window.num_frames, item.window.fps, str(item.bucket)]
        made_by = [self._fingerprint("video_encoder"), str(self.dtype), self.family.vae_tiling]
        return Sample(
            name=item.name,
            video_key=digest(["video", VERSION, self.family.name, made_by, made_of]),
            text_key=self.text_key(caption),
            caption=caption,
            bucket=item.bucket,
            fps=item.window.fps or self.family.default_fps,
            num_tokens=self.family.num_tokens(item.bucket),
        )

    def _fingerprint(self, role: str) -> str:
        if role not in self._fingerprints:
            self._fingerprints[role] = self.family.fingerprint(role)
        return self._fingerprints[role]

    def _read_ahead(self, wanted: list[tuple[str, Item]]) -> Iterator[tuple[str, Clip | UnusableClip]]:
        """Decode clips in threads, a few ahead of the encoder, in order."""
        ahead: deque[tuple[str, Future[Clip | UnusableClip]]] = deque()
        pool = ThreadPoolExecutor(max(self.num_workers, 1), thread_name_prefix="decode")
        try:
            for key, item in wanted:
                ahead.append((key, pool.submit(_read, item)))
                if len(ahead) > self.num_workers:
                    first, clip = ahead.popleft()
                    yield first, clip.result()
            for key, clip in ahead:
                yield key, clip.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _report_cut_captions(self, encoders: dict[str, object], captions: list[str]) -> None:
        lengths, limit = self.family.count_text_tokens(encoders, captions)
        cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]
        if cut:
            logger.warning(
                "%d of %d captions are longer than the %d tokens that the model reads; their ends are cut off, the "
                "first being: %.80s",
                *(len(cut), len(captions), limit, cut[0]),
            )


@dataclass(frozen=True)
class EncodedDataset:
    """What training draws from; every sample and text of it lies in the cache."""

    train: list[Sample]
    held_out: list[Sample]
    unreadable: list[Problem]
    """Clips left out because they could not be decoded."""


def encode_dataset(encoder: Encoder, dataset: Dataset, *, trigger: str, prompts: Sequence[str]) -> EncodedDataset:
    """Encode all clips, then all captions, the given prompts and the empty caption. Clips that turn out to be
    unreadable are left out and named."""
    items = [*dataset.train, *dataset.held_out]
    samples = encoder.samples(items, trigger=trigger)
    unreadable = encoder.encode_videos(items, samples)
    encoder.encode_texts([*(sample.caption for sample in samples), *prompts, ""])
    train, held_out = samples[: len(dataset.train)], samples[len(dataset.train) :]
    return EncodedDataset(
        [sample for sample in train if sample.video_key not in unreadable],
        [sample for sample in held_out if sample.video_key not in unreadable],
        [Problem(sample.name, unreadable[sample.video_key]) for sample in samples if sample.video_key in unreadable],
    )


def _read(item: Item) -> Clip | UnusableClip:
    try:
        return read_clip(item.record, item.media, item.window, item.bucket)
    except UnusableClip as error:
        return error


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
