"""Floating point operations of the passes of training, counted on models without memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from finetrainers.methods.base import Method
from finetrainers.planning import count_flop
from finetrainers.training.measures import save_activations
from finetrainers.training.simulated import meta_models
from finetrainers.types import Bucket, Condition


@dataclass(frozen=True)
class Operations:
    """Of a forward and a backward pass; a multiplication and an addition are two."""

    needed: float
    """As few as there must be."""
    executed: float
    """With activations that are computed again."""


def count_operations(
    method: Method, sizes: Collection[tuple[Bucket, Condition]], *, checkpointing: str
) -> dict[tuple[Bucket, Condition], Operations]:
    """The operations of one sample of each size, under a value of `training.gradient_checkpointing`. The family must be
    one that runs on the meta device."""

    def counted(checkpointing: str) -> list[float]:
        ours, models = meta_models(method)
        save_activations(ours, models, checkpointing=checkpointing, offload=False)
        return [count_flop(ours.family, models, bucket, condition)[1] for bucket, condition in sizes]

    needed = counted("none")
    executed = needed if checkpointing == "none" else counted(checkpointing)
    return {size: Operations(*flop) for size, *flop in zip(sizes, needed, executed, strict=True)}
