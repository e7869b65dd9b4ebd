"""Data meets family without weights: clips, tokens, parameters, steps and epochs of a run before it is started."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from finetrainers.data.dataset import Dataset
from finetrainers.data.scan import Item
from finetrainers.families.base import Family
from finetrainers.optimizers.size import state_bytes
from finetrainers.types import Bucket, Condition


@dataclass(frozen=True)
class BucketPlan:
    """What one bucket holds."""

    bucket: str
    clips: int
    tokens: int
    """Length of the transformer's video sequence for one sample."""
    forward_tflop: float | None
    """Work of one forward pass for one sample, in 1e12 floating point operations (a multiplication and an addition are
    two), attention included; None where the family cannot be counted."""
    training_tflop: float | None
    """Forward and backward pass as this run trains, adapters and computing activations again included."""


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


def count_parameters(models: Mapping[str, torch.nn.Module]) -> tuple[int, int]:
    """All parameters of the models as they will be trained, and those that move."""
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def states_gib(
    models: Mapping[str, torch.nn.Module], *, weights_dtype: torch.dtype, trained_dtype: torch.dtype, optimizer: str
) -> float:
    """Weights, gradients and optimizer state of a run whose processes share none of it, from models to which the method
    is attached, on whatever device; of the types that the method gives to what is loaded and to what moves."""
    every, trained = count_parameters(models)
    shapes = [tuple(p.shape) for model in models.values() for p in model.parameters() if p.requires_grad]
    state = state_bytes(optimizer, shapes)
    weights = (every - trained) * weights_dtype.itemsize + trained * trained_dtype.itemsize
    return (weights + trained * trained_dtype.itemsize + state.device + state.host) / 2**30


def count_flop(
    family: Family, models: Mapping[str, torch.nn.Module], bucket: Bucket, condition: Condition
) -> tuple[float, float]:
    """Floating point operations of a forward pass, and of a forward and a backward pass, for one sample of this size;
    counted on the real modules, which must lie on the meta device.

    Activations that are computed again count in the second where the models are set to do so. Of two experts one is
    counted, because each sample is seen by one.
    """
    one = {"transformer": next(model for name, model in models.items() if name.startswith("transformer"))}
    with torch.device("meta"):
        latents = torch.zeros(family.latent_channels, *family.latent_shape(bucket))
        given = family.given(condition, latents, family.blank_condition(bucket, condition), None)
        text = family.blank_text()
        with FlopCounterMode(display=False) as counter:
            answer = family.predict(
                one,
                latents[None],
                torch.zeros(1),
                text={name: tensor[None] for name, tensor in text.items()},
                given={name: tensor[None] for name, tensor in given.items()},
                fps_B=torch.full((1,), family.default_fps),
            )
            forward = counter.get_total_flops()
            answer.sum().backward()
    return float(forward), float(counter.get_total_flops())


def plan_buckets(
    family: Family, models: Mapping[str, torch.nn.Module], items: Sequence[Item], condition: Condition
) -> list[BucketPlan]:
    """Clips, tokens and work by bucket, largest first."""
    counts = Counter(item.bucket for item in items)
    ordered = sorted(counts.items(), key=lambda entry: (-family.num_tokens(entry[0]), entry[0]))
    plans = []
    for bucket, count in ordered:
        known = Condition() if bucket.num_frames == 1 else condition
        forward, training = None, None
        if family.runs_on_meta:
            forward, training = (flop / 1e12 for flop in count_flop(family, models, bucket, known))
        plans.append(BucketPlan(str(bucket), count, family.num_tokens(bucket), forward, training))
    return plans


def plan_run(
    family: Family,
    dataset: Dataset,
    buckets: list[BucketPlan],
    parameters: tuple[int, int],
    *,
    method: str,
    options: Any,
) -> Plan:
    """Put together what a run would do; `parameters` are all of the models' and those that move, and `options` the
    config's `training` section."""
    batches_per_epoch = sum(math.ceil(bucket.clips / options.batch_size) for bucket in buckets)
    return Plan(
        family=family.name,
        method=method,
        buckets=buckets,
        train_samples=len(dataset.train),
        held_out_samples=len(dataset.held_out),
        left_out=[asdict(problem) for problem in dataset.problems],
        batches_per_epoch=batches_per_epoch,
        steps=options.steps,
        epochs=options.steps * options.gradient_accumulation_steps / batches_per_epoch,
        parameters=parameters[0],
        trained_parameters=parameters[1],
    )
