"""Batches of one bucket in an order that is a pure function of seed and epoch, drawn ahead of the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from finetrainers.data.cache import Cache
from finetrainers.hashing import generator_for
from finetrainers.types import Batch, Bucket, Sample


class BatchOrder:
    """Which samples make batch number i, counted over all epochs. No sample is dropped: an epoch's last batches may
    be smaller."""

    def __init__(self, samples: Sequence[Sample], *, batch_size: int, seed: int) -> None:
        self._buckets = [sample.bucket for sample in samples]
        self._batch_size = batch_size
        self._seed = seed
        counts: dict[Bucket, int] = {}
        for bucket in self._buckets:
            counts[bucket] = counts.get(bucket, 0) + 1
        self.batches_per_epoch = sum(-(-count // batch_size) for count in counts.values())
        self._epoch = -1
        self._batches: list[tuple[int, ...]] = []

    def __getitem__(self, index: int) -> tuple[int, tuple[int, ...]]:
        """The epoch of a batch and the indices of its samples."""
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return epoch, self._batches[position]

    def _shuffle(self, epoch: int) -> list[tuple[int, ...]]:
        """Walk a permutation and emit each batch as its bucket fills, so that with one bucket the sequence of samples
        does not depend on the batch size; what did not fill a batch comes last."""
        generator = generator_for(self._seed, "order", epoch)
        filling: dict[Bucket, list[int]] = {}
        batches = []
        for index in torch.randperm(len(self._buckets), generator=generator).tolist():
            batch = filling.setdefault(self._buckets[index], [])
            batch.append(index)
            if len(batch) == self._batch_size:
                batches.append(tuple(filling.pop(self._buckets[index])))
        return batches + [tuple(batch) for batch in filling.values()]


@dataclass(frozen=True)
class BatchDrawer:
    """Reads samples from the cache and draws all that is random about them, keyed by seed, epoch and sample."""

    samples: Sequence[Sample]
    cache: Cache
    sample_sigma: Callable[[int, torch.Generator], float]
    seed: int
    caption_dropout: float
    empty_text_key: str
    """Cache key of the empty caption."""

    def draw(self, epoch: int, indices: Sequence[int]) -> Batch:
        """The batch of these samples in this epoch."""
        samples = [self.samples[index] for index in indices]
        latents, noises, sigmas, texts = [], [], [], []
        for index, sample in zip(indices, samples, strict=True):
            moments = self.cache.read("videos", sample.video_key)
            latents.append(_draw_latents(moments, generator_for(self.seed, "latents", epoch, index)))
            noises.append(torch.randn(latents[-1].shape, generator=generator_for(self.seed, "noise", epoch, index)))
            sigmas.append(self.sample_sigma(sample.num_tokens, generator_for(self.seed, "sigma", epoch, index)))
            coin = torch.rand((), generator=generator_for(self.seed, "caption", epoch, index)).item()
            key = self.empty_text_key if coin < self.caption_dropout else sample.text_key
            texts.append(self.cache.read("texts", key))
        return Batch(
            latents_BCFHW=torch.stack(latents),
            noise_BCFHW=torch.stack(noises),
            sigma_B=torch.tensor(sigmas),
            text={name: torch.stack([text[name] for text in texts]) for name in texts[0]},
            fps=tuple(sample.fps for sample in samples),
            names=tuple(sample.name for sample in samples),
            num_tokens=sum(sample.num_tokens for sample in samples),
        )

    def fixed(self, index: int, sigma: float) -> Batch:
        """One sample, from the mean of its posterior, at this noise level and the noise that belongs to both: the same
        at every call."""
        sample = self.samples[index]
        latents = _draw_latents(self.cache.read("videos", sample.video_key), generator=None)
        noise = torch.randn(
            latents.shape, generator=generator_for(self.seed, "validation", sample.video_key, f"{sigma:.6f}")
        )
        return Batch(
            latents_BCFHW=latents[None],
            noise_BCFHW=noise[None],
            sigma_B=torch.tensor([sigma]),
            text={name: tensor[None] for name, tensor in self.cache.read("texts", sample.text_key).items()},
            fps=(sample.fps,),
            names=(sample.name,),
            num_tokens=sample.num_tokens,
        )


def _draw_latents(moments: dict[str, torch.Tensor], generator: torch.Generator | None) -> torch.Tensor:
    """Normalised latents [C, F, H, W], fp32: a draw from the posterior, or its mean without a generator."""
    latents = moments["mean"].float()
    if generator is not None:
        deviation = torch.exp(0.5 * moments["logvar"].float())
        latents = latents + deviation * torch.randn(latents.shape, generator=generator)
    return (latents - moments["shift"].view(-1, 1, 1, 1)) * moments["scale"].view(-1, 1, 1, 1)


@dataclass(frozen=True)
class BatchStream:
    """An endless run of batches from any position, read ahead by threads; their number never changes what comes."""

    order: BatchOrder
    drawer: BatchDrawer
    num_workers: int
    pin_memory: bool

    def start(self, position: int) -> Iterator[tuple[int, Batch]]:
        """Yield (epoch, batch) from batch number `position` on."""
        if self.num_workers == 0:
            while True:
                yield self._load(*self.order[position])
                position += 1
        ahead: deque[Future[tuple[int, Batch]]] = deque()
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="batches")
        try:
            while True:
                while len(ahead) <= self.num_workers:
                    ahead.append(pool.submit(self._load, *self.order[position]))
                    position += 1
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, epoch: int, indices: tuple[int, ...]) -> tuple[int, Batch]:
        batch = self.drawer.draw(epoch, indices)
        if self.pin_memory:
            batch = map_tensors(batch, lambda tensor: tensor.pin_memory())
        return epoch, batch


def map_tensors(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch with each of its tensors changed, say moved."""
    return replace(
        batch,
        latents_BCFHW=change(batch.latents_BCFHW),
        noise_BCFHW=change(batch.noise_BCFHW),
        sigma_B=change(batch.sigma_B),
        text={name: change(tensor) for name, tensor in batch.text.items()},
    )
