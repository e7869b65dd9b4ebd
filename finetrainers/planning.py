"""Data meets family without weights: clips, tokens, parameters, steps and epochs of a run before it is started."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from finetrainers.data.dataset import Dataset
from finetrainers.data.scan import Item
from finetrainers.families.base import Family


@dataclass(frozen=True)
class BucketPlan:
    """What one bucket holds."""

    bucket: str
    clips: int
    tokens: int
    """Length of the transformer's video sequence for one sample."""


@dataclass(frozen=True)
class Plan:
    """What would happen."""

    family: str
    method: str
    buckets: list[BucketPlan]
    train_samples: int
    held_out_samples: int
    left_out: list[dict[str, str]]
    """Clips that cannot be used: name and reason."""
    batches_per_epoch: int
    steps: int
    epochs: float
    parameters: int
    trained_parameters: int

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)


def count_parameters(transformer: torch.nn.Module, trained: dict[str, torch.nn.Parameter]) -> tuple[int, int]:
    """All parameters of the transformer as it will be trained, and those that move."""
    return sum(p.numel() for p in transformer.parameters()), sum(p.numel() for p in trained.values())


def plan_buckets(family: Family, items: Sequence[Item]) -> list[BucketPlan]:
    """Clips and tokens by bucket, largest first."""
    counts = Counter(item.bucket for item in items)
    ordered = sorted(counts.items(), key=lambda entry: (-family.num_tokens(entry[0]), entry[0]))
    return [BucketPlan(str(bucket), count, family.num_tokens(bucket)) for bucket, count in ordered]


def plan_run(
    family: Family,
    dataset: Dataset,
    parameters: tuple[int, int],
    *,
    method: str,
    steps: int,
    batch_size: int,
    accumulation: int,
) -> Plan:
    """Put together what a run would do; `parameters` are all of the transformer's and those that move."""
    buckets = plan_buckets(family, dataset.train)
    batches_per_epoch = sum(math.ceil(bucket.clips / batch_size) for bucket in buckets)
    return Plan(
        family=family.name,
        method=method,
        buckets=buckets,
        train_samples=len(dataset.train),
        held_out_samples=len(dataset.held_out),
        left_out=[asdict(problem) for problem in dataset.problems],
        batches_per_epoch=batches_per_epoch,
        steps=steps,
        epochs=steps * accumulation / batches_per_epoch,
        parameters=parameters[0],
        trained_parameters=parameters[1],
    )
