"""A trainer on a tiny LTX transformer and latents made up in memory: no files but the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finetrainers.config.schema import FullOptions, LoraOptions, ModelConfig, ObjectiveConfig, OptimizerConfig
from finetrainers.data.batch import Drawn
from finetrainers.engines.single import SingleEngine
from finetrainers.families.find import find_family
from finetrainers.families.ltx import TARGETS
from finetrainers.hashing import generator_for
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.optimizers.build import build_optimizer
from finetrainers.optimizers.kinds import defaults
from finetrainers.training.callback import Callback
from finetrainers.training.schedule import build_schedule
from finetrainers.training.trainer import Trainer
from finetrainers.types import Batch

OBJECTIVE = build_objective(
    ObjectiveConfig(timestep_sampling="shifted_logit_normal", shift=1.0), alphas_cumprod=None, noise_range=(0.0, 1.0)
)


def lora(**options: Any) -> LoraOptions:
    return LoraOptions(**({"rank": 4, "target_modules": TARGETS} | options))


def full(**options: Any) -> FullOptions:
    return FullOptions(name="full", **options)


def optimizer_options(name: str = "adamw", **options: Any) -> OptimizerConfig:
    """The `optimizer` section as a run has it, filled in."""
    filled = {key.partition(".")[2]: value for key, value in defaults(name).items()}
    return OptimizerConfig(**({"name": name, "lr": 1e-3, "weight_decay": 0.0} | filled | options))


def make_batch(indices: Sequence[int], *, seed: int = 0, epoch: int = 0) -> Batch:
    """Samples that depend on their index alone, each with noise of its own."""

    def drawn(what: str, *shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=generator_for(seed, what, index)) for index in indices])

    uniform = [torch.rand((), generator=generator_for(seed, "level", epoch, index)).item() for index in indices]
    mask = torch.ones(len(indices), 6, dtype=torch.bool)
    mask[:, 4:] = False
    return Batch(
        latents_BCFHW=drawn("latents", 8, 2, 2, 3),
        noise_BCFHW=torch.stack(
            [torch.randn(8, 2, 2, 3, generator=generator_for(seed, "noise", epoch, index)) for index in indices]
        ),
        level_B=torch.tensor([OBJECTIVE.law(12, u) for u in uniform]),
        text={"prompt_embeds": drawn("text", 6, 32), "prompt_attention_mask": mask},
        given={},
        fps_B=torch.full((len(indices),), 25.0, dtype=torch.float64),
        names=tuple(str(index) for index in indices),
        num_tokens=12 * len(indices),
    )


class Batches:
    """A stream of given batches; stands for BatchStream."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def start(self, position: int) -> Iterator[Drawn]:
        while True:
            epoch, index = divmod(position, len(self.batches))
            yield Drawn(position, epoch, self.batches[index], self.batches[index].size)
            position += 1


def make_trainer(
    model: Path,
    batches: Sequence[Batch],
    *,
    options: Any = None,
    dtype: torch.dtype = torch.float32,
    callbacks: Sequence[Callback] = (),
    optimizer: str | OptimizerConfig = "adamw",
    lr: float = 1e-3,
    recorder: Any = None,
    **settings: Any,
) -> Trainer:
    """A whole trainer; `settings` are its numbers. An optimizer by name alone takes `lr`."""
    family = find_family(ModelConfig(path=str(model)))
    method = find_method(options or lora(), family, OBJECTIVE, dtype=dtype)
    engine = SingleEngine()
    models = method.load(engine.device)
    method.attach(models, seed=1)
    engine.prepare(models, {}, method.linear_dtype)
    trained = method.trained(models)
    numbers = {"steps": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "seed": 0} | settings
    if isinstance(optimizer, str):
        optimizer = optimizer_options(optimizer, lr=lr)
    built = build_optimizer(trained, optimizer, seed=numbers["seed"])
    return Trainer(
        method=method,
        models=models,
        trained=trained,
        batches=Batches(batches),
        optimizer=built,
        schedule=build_schedule("constant", built, warmup_steps=0, steps=numbers["steps"]),
        engine=engine,
        callbacks=callbacks,
        recorder=recorder,
        **numbers,
    )
