"""Batches of one bucket in an order that is a pure function of seed and epoch, drawn ahead of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from typing import Protocol

import torch

from finetrainers.background import begun_ahead
from finetrainers.data.cache import Cache
from finetrainers.data.transfer import Transfer
from finetrainers.hashing import generator_for
from finetrainers.latents import draw_latents
from finetrainers.types import Batch, Bucket, Condition, Sample


class BatchOrder:
    """Which samples make batch number i, counted over all epochs. No sample is dropped: an epoch's last batches may
    be smaller."""

    def __init__(self, samples: Sequence[Sample], *, batch_size: int, seed: int) -> None:
        numbers: dict[Bucket, int] = {}
        self._buckets = torch.tensor([numbers.setdefault(sample.bucket, len(numbers)) for sample in samples])
        self._batch_size = batch_size
        self._seed = seed
        self._counts = torch.bincount(self._buckets)
        self.batches_per_epoch = int((-(-self._counts // batch_size)).sum())
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, index: int) -> tuple[int, tuple[int, ...]]:
        """The epoch of a batch and the indices of its samples."""
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return epoch, tuple(self._batches[position])

    def _shuffle(self, epoch: int) -> list[list[int]]:
        """Walk a permutation and emit each batch as its bucket fills, so that with one bucket the sequence of samples
        does not depend on the batch size; what did not fill a batch comes last, as it began to."""
        size, counts = self._batch_size, self._counts
        samples = torch.randperm(len(self._buckets), generator=generator_for(self._seed, "order", epoch))
        # Steps of the walk by bucket, and the number of each within its bucket.
        steps = torch.sort(self._buckets[samples], stable=True).indices
        within = torch.arange(len(steps)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        fills = within < (counts // size * size).repeat_interleave(counts)
        full = steps[fills].view(-1, size)
        full = full[full[:, -1].argsort()]
        rest = [part for part in steps[~fills].split((counts % size).tolist()) if len(part)]
        rest.sort(key=lambda part: int(part[0]))
        return samples[full].tolist() + [samples[part].tolist() for part in rest]


@dataclass(frozen=True)
class Strata:
    """Uniform draws that are spread evenly over the samples of each optimizer step: of n, one lies in each n-th part of
    (0, 1). Noise levels drawn by them leave less to chance than independent ones, however the step is cut up into
    batches."""

    seed: int
    batch_size: int
    batches_per_step: int
    """Over accumulation and all processes."""

    def draw(self, position: int, count: int) -> list[float]:
        """The draws of batch number `position`, which has so many samples."""
        step, batch = divmod(position, self.batches_per_step)
        generator = generator_for(self.seed, "levels", step)
        total = self.batch_size * self.batches_per_step
        parts = torch.randperm(total, generator=generator).double()
        spread = (parts + torch.rand(total, generator=generator).double()) / total
        start = batch * self.batch_size
        return spread[start : start + count].tolist()


class Giver(Protocol):
    """What a family makes of the frames that its model is given; see `Family.given`."""

    def __call__(
        self,
        condition: Condition,
        latents_CFHW: torch.Tensor,
        encoded: Mapping[str, torch.Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, torch.Tensor]:
        """The tensors of one sample."""


@dataclass(frozen=True)
class Size:
    """All of a batch that decides its work and its memory."""

    bucket: Bucket
    condition: Condition
    """Which frames are given."""
    num_samples: int


@dataclass(frozen=True)
class BatchDrawer:
    """Reads samples from the cache and draws all that is random about them, keyed by seed and step or sample."""

    samples: Sequence[Sample]
    cache: Cache
    law: Callable[[int, float], float]
    """Noise level of a uniform draw, given the number of video tokens."""
    strata: Strata
    caption_dropout: float
    conditions: Sequence[tuple[Condition, float]]
    """What is given of the clips, and how often; the shares add up to 1."""
    given: Giver

    def draw(self, position: int, epoch: int, indices: Sequence[int]) -> Batch:
        """Batch number `position`, made of these samples in this epoch."""
        samples, seed = [self.samples[index] for index in indices], self.strata.seed
        condition = self._draw_condition(epoch, indices[0])
        levels = self.strata.draw(position, len(indices))
        latents, noises, texts, given = [], [], [], []
        for index, sample in zip(indices, samples, strict=True):
            moments = self.cache.read("videos", sample.video_key)
            latents.append(draw_latents(moments, generator_for(seed, "latents", epoch, index)))
            noises.append(torch.randn(latents[-1].shape, generator=generator_for(seed, "noise", epoch, index)))
            coin = torch.rand((), generator=generator_for(seed, "caption", epoch, index)).item()
            key = sample.empty_text_key if coin < self.caption_dropout else sample.text_key
            texts.append(self.cache.read("texts", key))
            chance = None if condition.is_none else generator_for(seed, "given", epoch, index)
            given.append(self._given(sample, condition, latents[-1], chance))
        return Batch(
            latents_BCFHW=torch.stack(latents),
            noise_BCFHW=torch.stack(noises),
            level_B=torch.tensor([self.law(s.num_tokens, u) for s, u in zip(samples, levels, strict=True)]),
            text=_stack(texts),
            given=_stack(given),
            fps_B=torch.tensor([sample.fps for sample in samples], dtype=torch.float64),
            names=tuple(sample.name for sample in samples),
            num_tokens=sum(sample.num_tokens for sample in samples),
        )

    def size(self, epoch: int, indices: Sequence[int]) -> Size:
        """That of the batch which these samples make in this epoch, without reading it."""
        first = indices[0]
        return Size(self.samples[first].bucket, self._draw_condition(epoch, first), len(indices))

    def fixed(self, index: int, level: float) -> Batch:
        """One sample, from the mean of its posterior, under the most common condition, at this noise level and the
        noise that belongs to both: the same at every call."""
        sample = self.samples[index]
        latents = draw_latents(self.cache.read("videos", sample.video_key), generator=None)
        generator = generator_for(self.strata.seed, "validation", sample.video_key, f"{level:.6f}")
        condition = max(self.conditions, key=lambda entry: entry[1])[0] if sample.bucket.num_frames > 1 else Condition()
        return Batch(
            latents_BCFHW=latents[None],
            noise_BCFHW=torch.randn(latents.shape, generator=generator)[None],
            level_B=torch.tensor([level]),
            text=_stack([self.cache.read("texts", sample.text_key)]),
            given=_stack([self._given(sample, condition, latents, None)]),
            fps_B=torch.tensor([sample.fps], dtype=torch.float64),
            names=(sample.name,),
            num_tokens=sample.num_tokens,
        )

    def _draw_condition(self, epoch: int, first: int) -> Condition:
        """One condition for the whole batch, since it may decide the length of the sequence. A still image has no other
        frames to give."""
        if self.samples[first].bucket.num_frames == 1:
            return Condition()
        if len(self.conditions) == 1:
            return self.conditions[0][0]
        coin = torch.rand((), generator=generator_for(self.strata.seed, "condition", epoch, first)).item()
        for condition, share in self.conditions:
            coin -= share
            if coin < 0:
                return condition
        return self.conditions[-1][0]

    def _given(
        self, sample: Sample, condition: Condition, latents: torch.Tensor, generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        key = sample.condition_keys.get(str(condition))
        encoded = {} if key is None else self.cache.read("conditions", key)
        return self.given(condition, latents, encoded, generator)


def _stack(entries: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


@dataclass(frozen=True)
class Drawn:
    """A batch, and what all processes together take beside it."""

    position: int
    """Number of the batch, over all epochs and processes."""
    epoch: int
    batch: Batch
    num_samples: int
    """Samples of the batches that all processes take in this round."""


@dataclass(frozen=True)
class BatchStream:
    """An endless run of batches from any position, read ahead by threads; their number never changes what comes. Of
    several processes each takes its own of every round of batches, so that together they see each sample once."""

    order: BatchOrder
    drawer: BatchDrawer
    num_workers: int
    transfer: Transfer
    rank: int = 0
    world_size: int = 1

    def start(self, position: int) -> Iterator[Drawn]:
        """Yield this process's batches from batch number `position` on, which begins a round. When one is handed out
        the next one is on its way to the device, if it has been read."""
        jobs = (partial(self._load, *self._choose(start)) for start in count(position, self.world_size))
        if self.num_workers == 0:
            for job in jobs:
                yield self._send(job())()
        under_way: Callable[[], Drawn] | None = None
        with closing(begun_ahead(jobs, num_workers=self.num_workers, name="batches")) as begun:
            for current, following in pairwise(begun):
                receive = under_way or self._send(current.result())
                is_read = following.done() and following.exception() is None
                under_way = self._send(following.result()) if is_read else None
                yield receive()

    def sizes(self, position: int) -> list[Size]:
        """Of every process's batch in the round that begins at batch number `position`."""
        return [self.drawer.size(*self.order[position + rank]) for rank in range(self.world_size)]

    def _choose(self, position: int) -> tuple[int, int, tuple[int, ...], int]:
        """Position, epoch and samples of this process's batch in the round that begins here, and the round's size."""
        # Each asked once and in order: going back over the end of an epoch would shuffle it anew.
        batches = [self.order[position + rank] for rank in range(self.world_size)]
        return position + self.rank, *batches[self.rank], sum(len(indices) for _, indices in batches)

    def _load(self, position: int, epoch: int, indices: tuple[int, ...], num_samples: int) -> Drawn:
        batch = self.transfer.prepare(self.drawer.draw(position, epoch, indices))
        return Drawn(position, epoch, batch, num_samples)

    def _send(self, drawn: Drawn) -> Callable[[], Drawn]:
        receive = self.transfer.send(drawn.batch)
        return lambda: replace(drawn, batch=receive())
