"""A method on any tiny model with a batch made up in memory, plain and with its frozen weights in low precision."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from finetrainers.config.schema import LoraOptions, MemoryConfig, ObjectiveConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.families.base import Family
from finetrainers.hashing import generator_for
from finetrainers.memory.quantized import QuantizedLinear
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.training.models import load_models
from finetrainers.types import Batch, Bucket, Condition
from tests.families.parity import inputs_of, random_clip
from tests.families.tiny import TINY

FORMATS = ("fp8", "int8", "nf4")
ROWS = ("ltx-0.9.5-i2v", "cogvideox-1.5-i2v", "hunyuan-i2v", "wan-2.1-i2v", "wan-2.2-a14b")
"""Each family, with frames given where there are."""


def lora_method(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Method:
    """LoRA of rank 4 on one row's model."""
    family = TINY[name].open(folder)
    defaults = family.defaults("lora")
    options = {"rank": 4, "target_modules": defaults["method.target_modules"]} | options
    objective = {key.partition(".")[2]: value for key, value in defaults.items() if key.startswith("objective.")}
    built = build_objective(
        ObjectiveConfig(**objective), alphas_cumprod=family.alphas_cumprod(), noise_range=family.noise_range
    )
    return find_method(LoraOptions(**options), family, built, dtype=dtype)


def load(method: Method, **memory: Any) -> tuple[dict[str, torch.nn.Module], dict[str, torch.nn.Parameter]]:
    """The models and what moves of them, as a run has them; the adapters' second halves are made to matter."""
    kept_in = memory.pop("kept_in", Path())
    options = MemoryConfig(**memory)
    models, trained = load_models(
        method, SingleEngine(), options=options, seed=1, checkpointing="none", kept_in=kept_in
    )
    for name, parameter in trained.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator_for(0, name))
    return models, trained


@cache
def batch_of(name: str, folder: Path, seed: int = 0) -> Batch:
    """One clip of noise, at a noise level of its own."""
    row = TINY[name]
    family: Family = row.open(folder)
    bucket, condition = Bucket.parse(row.bucket), Condition.parse(row.conditions[0])
    latents, rest = inputs_of(family, random_clip(bucket, seed=seed), condition)
    low, high = family.noise_range
    share = torch.rand((), generator=generator_for(seed, "level"))
    return Batch(
        latents_BCFHW=latents,
        noise_BCFHW=torch.randn(latents.shape, generator=generator_for(seed, "noise")),
        level_B=(low + (high - low) * share)[None],
        fps_B=torch.tensor([16.0], dtype=torch.float64),
        names=(str(seed),),
        num_tokens=family.num_tokens(bucket),
        **rest,
    )


def quantized_layers(models: dict[str, torch.nn.Module]) -> dict[str, QuantizedLinear]:
    """By model and path."""
    return {
        f"{part}.{name}": module
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def moved(batch: Batch, models: dict[str, torch.nn.Module]) -> Batch:
    """The batch where the models are."""
    device = next(models["transformer"].parameters()).device
    return batch.map(lambda tensor: tensor.to(device))


def steps(method: Method, name: str, folder: Path, num_steps: int, **memory: Any) -> SimpleNamespace:
    """Losses and gradient norms of a short run over as many batches."""
    models, trained = load(method, **memory)
    optimizer = torch.optim.AdamW(list(trained.values()), lr=1e-3)
    losses, norms = [], []
    answer = answer_share(method, models, moved(batch_of(name, folder), models))
    for step in range(num_steps):
        loss = method.loss(models, moved(batch_of(name, folder, step), models)).sum()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None]).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(losses=losses, norms=norms, trained=trained, models=models, answer=answer)


def answer_share(method: Method, models: dict[str, torch.nn.Module], batch: Batch) -> float:
    """The length of a model's answer beside that of its error."""
    noised = method.objective.noise(batch.latents_BCFHW, batch.noise_BCFHW, batch.level_B)
    with torch.no_grad():
        answer = method.family.predict(
            models, noised.input_BCFHW, noised.timestep_B, text=batch.text, given=batch.given, fps_B=batch.fps_B
        )
    return (answer.norm() / (answer - noised.target_BCFHW).norm()).item()
