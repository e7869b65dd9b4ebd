"""A trainer on a tiny LTX transformer and latents made up in memory: no files but the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finetrainers.config.schema import FullOptions, LoraOptions
from finetrainers.engines.single import SingleEngine
from finetrainers.families.find import find_family
from finetrainers.families.ltx import TARGETS
from finetrainers.hashing import generator_for
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.training.callback import Callback
from finetrainers.training.optimizer import build_optimizer, build_schedule
from finetrainers.training.trainer import Trainer
from finetrainers.types import Batch

OBJECTIVE = build_objective("shifted_logit_normal", logit_mean=0.0, logit_std=1.0, uniform_share=0.1)


def lora(**options: Any) -> LoraOptions:
    return LoraOptions(**({"rank": 4, "target_modules": TARGETS} | options))


def full() -> FullOptions:
    return FullOptions(name="full")


def make_batch(indices: Sequence[int], *, seed: int = 0, epoch: int = 0) -> Batch:
    """Samples that depend on their index alone, each with noise of its own."""

    def drawn(what: str, *shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=generator_for(seed, what, index)) for index in indices])

    sigmas = [OBJECTIVE.sample_sigma(12, generator_for(seed, "sigma", epoch, index)) for index in indices]
    mask = torch.ones(len(indices), 6, dtype=torch.bool)
    mask[:, 4:] = False
    return Batch(
        latents_BCFHW=drawn("latents", 8, 2, 2, 3),
        noise_BCFHW=torch.stack(
            [torch.randn(8, 2, 2, 3, generator=generator_for(seed, "noise", epoch, index)) for index in indices]
        ),
        sigma_B=torch.tensor(sigmas),
        text={"prompt_embeds": drawn("text", 6, 32), "prompt_attention_mask": mask},
        fps=(25.0,) * len(indices),
        names=tuple(str(index) for index in indices),
        num_tokens=12 * len(indices),
    )


class Batches:
    """A stream of given batches; stands for BatchStream."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def start(self, position: int) -> Iterator[tuple[int, Batch]]:
        while True:
            yield divmod(position, len(self.batches))[0], self.batches[position % len(self.batches)]
            position += 1


def make_trainer(
    model: Path,
    batches: Sequence[Batch],
    *,
    options: Any = None,
    dtype: torch.dtype = torch.float32,
    callbacks: Sequence[Callback] = (),
    optimizer: str = "adamw",
    lr: float = 1e-3,
    **settings: Any,
) -> Trainer:
    """A whole trainer; `settings` are its numbers."""
    family = find_family(str(model), revision=None, task="text-to-video")
    method = find_method(options or lora(), family, OBJECTIVE, dtype=dtype)
    transformer = family.load_transformer(method.weights_dtype)
    trained = method.attach(transformer, seed=1)
    parameters = list(trained.values())
    built = build_optimizer(optimizer, parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    engine = SingleEngine()
    numbers = {"steps": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "seed": 0} | settings
    return Trainer(
        method=method,
        transformer=engine.prepare(transformer),
        trained=trained,
        batches=Batches(batches),
        optimizer=built,
        schedule=build_schedule("constant", built, warmup_steps=0, steps=numbers["steps"]),
        engine=engine,
        callbacks=callbacks,
        **numbers,
    )
