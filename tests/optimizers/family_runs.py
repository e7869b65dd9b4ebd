"""Trainers on the tiny model of any family, in this process, on two random clips of its own encoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetrainers.config.schema import ObjectiveConfig, OptimizerConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.families.base import Family
from finetrainers.hashing import generator_for
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.optimizers.build import build_optimizer
from finetrainers.training.callback import Callback
from finetrainers.training.schedule import build_schedule
from finetrainers.training.trainer import Trainer
from finetrainers.types import Batch, Bucket, Condition
from tests.families.parity import inputs_of, random_clip, rates
from tests.families.tiny import TINY
from tests.training.tiny_run import Batches

FAMILIES = ["ltx-0.9.0", "cogvideox-2b", "hunyuan", "wan-2.1"]


def family_batches(name: str, family: Family) -> list[Batch]:
    """Two batches of one clip each."""
    row, batches = TINY[name], []
    low, high = family.noise_range
    for seed in range(2):
        latents, inputs = inputs_of(family, random_clip(Bucket.parse(row.bucket), seed=seed), Condition())
        noise = torch.randn(latents.shape, generator=generator_for(seed, "noise"))
        level = torch.tensor([low + (high - low) * (0.3 + 0.4 * seed)])
        named = {"fps_B": rates(16.0), "names": (str(seed),), "num_tokens": 1}
        batches.append(Batch(latents_BCFHW=latents, noise_BCFHW=noise, level_B=level, **inputs, **named))
    return batches


def family_trainer(
    name: str,
    folder: Path,
    *,
    options: Any,
    optimizer: OptimizerConfig,
    dtype: torch.dtype = torch.float32,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """A whole trainer on a row's model; `settings` are its numbers."""
    family = TINY[name].open(folder)
    chosen = ObjectiveConfig(timestep_sampling="uniform", shift=1.0)
    objective = build_objective(chosen, alphas_cumprod=family.alphas_cumprod(), noise_range=family.noise_range)
    method = find_method(options, family, objective, dtype=dtype)
    engine = SingleEngine()
    models = method.load(engine.device)
    method.attach(models, seed=1)
    engine.prepare(models, {}, method.linear_dtype)
    trained = method.trained(models)
    numbers = {"steps": 3, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "seed": 0} | settings
    built = build_optimizer(trained, optimizer, seed=0)
    return Trainer(
        method=method,
        models=models,
        trained=trained,
        batches=Batches(family_batches(name, family)),
        optimizer=built,
        schedule=build_schedule("linear", built, warmup_steps=0, steps=10),
        engine=engine,
        callbacks=callbacks,
        **numbers,
    )
