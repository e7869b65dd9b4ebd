"""B1 and B2: what the loop costs beyond forward and backward, on tiny LTX transformers with LoRA, in one process: one
layer, the depth of LTX-Video, and six wider layers.

Whole steps (batches read from the cache, clipping, optimizer, schedule, metrics, progress) over the forward and
backward passes within them; and over rounds of forward and backward alone on the same batches, which take turns with
them and share Python with no thread that draws batches ahead.
Run: python benchmarks/loop.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from machine import describe_machine, write_record

from finetrainers.config.schema import LoraOptions, ModelConfig, ObjectiveConfig, OptimizerConfig
from finetrainers.data.batch import BatchDrawer, BatchOrder, BatchStream, Strata
from finetrainers.data.cache import Cache
from finetrainers.data.transfer import Transfer
from finetrainers.engines.single import SingleEngine
from finetrainers.families.ltx import TARGETS, LTXVideo
from finetrainers.folder import RunFolder
from finetrainers.methods.lora import Lora
from finetrainers.objectives import build_objective
from finetrainers.optimizers.build import build_optimizer
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.progress import ProgressLine
from finetrainers.training.schedule import build_schedule
from finetrainers.training.trainer import Trainer
from finetrainers.types import Batch, Bucket, Condition, Sample

SHAPES = {
    "B1: 1 layer, 160 tokens, width 32": {"layers": 1, "heads": 4, "head": 8, "latent": (4, 5, 8), "goal": 1.10},
    "B2: 28 layers, 160 tokens, width 32": {
        "layers": 28, "heads": 4, "head": 8, "latent": (4, 5, 8), "goal_beside_ms": 9.0,
    },
    "B2: 6 layers, 1280 tokens, width 256": {"layers": 6, "heads": 4, "head": 64, "latent": (5, 16, 16), "goal": 1.01},
}  # fmt: skip
PEERS = {
    "B1": "finetrainers main 1.84-1.92 (Accelerate), 1.71-1.79 (PTD), v0.0.1 1.69-1.71; bare torch, fused AdamW 1.06",
    "B2": "finetrainers main 1.016-1.018, v0.0.1 1.015-1.016; bare torch, fused AdamW 1.003",
}
ROUNDS, WARM_UP = 15, 10
STEPS_PER_ROUND = {1: 20, 6: 4, 28: 5}
"""By layers."""


class FakeFamily(LTXVideo):
    """LTX-Video without a model folder: the benchmark builds its transformer from numbers."""

    is_causal = False
    strides = (8, 32)


def build_trainer(folder: Path, shape: dict[str, Any], steps: int) -> Trainer:
    """A whole trainer over a cache of 16 samples."""
    frames, height, width = shape["latent"]
    cache = Cache(folder / "cache")
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(16):
        mean = torch.randn(128, frames, height, width, generator=generator)
        moments = {"mean": mean, "logvar": mean.clone(), "shift": torch.zeros(128), "scale": torch.ones(128)}
        cache.write("videos", f"v{index:02d}", moments)
        text = {"prompt_embeds": torch.randn(128, 32, generator=generator)}
        text["prompt_attention_mask"] = torch.ones(128, dtype=torch.bool)
        cache.write("texts", f"t{index:02d}", text)
        bucket = Bucket(8 * frames - 7, 32 * height, 32 * width)
        tokens = frames * height * width
        samples.append(Sample(str(index), f"v{index:02d}", f"t{index:02d}", "t00", {}, "", bucket, 25.0, tokens))
    transformer = LTXVideoTransformer3DModel(
        num_attention_heads=shape["heads"],
        attention_head_dim=shape["head"],
        cross_attention_dim=shape["heads"] * shape["head"],
        num_layers=shape["layers"],
        caption_channels=32,
    )
    law = ObjectiveConfig(timestep_sampling="shifted_logit_normal", shift=1.0)
    objective = build_objective(law, alphas_cumprod=None, noise_range=(0.0, 1.0))
    family = FakeFamily(folder, ModelConfig(path=str(folder)))
    options = LoraOptions(rank=4, target_modules=TARGETS)
    method = Lora(family, objective, options, dtype=torch.float32)
    models = {"transformer": transformer}
    method.attach(models, seed=0)
    trained = method.trained(models)
    options = OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    optimizer = build_optimizer(trained, options, seed=0)
    drawer = BatchDrawer(samples, cache, objective.law, Strata(0, 1, 1), 0.05, [(Condition(), 1.0)], family.given)
    progress = ProgressLine()
    return Trainer(
        method=method,
        models=models,
        trained=trained,
        batches=BatchStream(
            BatchOrder(samples, batch_size=1, seed=0), drawer, num_workers=2, transfer=Transfer(torch.device("cpu"))
        ),
        optimizer=optimizer,
        schedule=build_schedule("constant", optimizer, warmup_steps=0, steps=steps),
        engine=SingleEngine(),
        callbacks=[MetricsFile(RunFolder(folder), listeners=[progress.on_row]), progress],
        steps=steps,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        seed=0,
    )


def forward_backward(trainer: Trainer, batches: list[Batch]) -> float:
    """Seconds per batch of forward and backward alone."""
    total = 0.0
    for batch in batches:
        begun = time.perf_counter()
        trainer.loss(batch).sum().backward()
        total += time.perf_counter() - begun
        for parameter in trainer.trained.values():
            parameter.grad = None
    return total / len(batches)


def measure(shape: dict[str, Any], steps_per_round: int) -> dict[str, Any]:
    """Medians over rounds, in milliseconds, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(Path(folder), shape, steps=10**6)
        for callback in trainer.callbacks:
            callback.on_start(trainer)
        stream = trainer.batches.start(0)
        bare = [next(stream).batch for _ in range(steps_per_round)]

        inside = watch_passes(trainer)

        def whole_steps() -> tuple[float, float]:
            inside.clear()
            begun = time.perf_counter()
            for _ in range(steps_per_round):
                outcome = trainer.step(stream)
                for callback in trainer.callbacks:
                    callback.on_step_end(trainer, outcome)
            whole = time.perf_counter() - begun
            return whole / steps_per_round, sum(inside) / steps_per_round

        for _ in range(-(-WARM_UP // steps_per_round)):
            whole_steps(), forward_backward(trainer, bare)
        rounds = [(*whole_steps(), forward_backward(trainer, bare)) for _ in range(ROUNDS)]
        stream.close()
        for callback in trainer.callbacks:
            callback.close()
    ratios = sorted(step / passes for step, passes, _ in rounds)
    return {
        "step_ms": 1000 * statistics.median(step for step, _, _ in rounds),
        "passes_within_ms": 1000 * statistics.median(passes for _, passes, _ in rounds),
        "passes_alone_ms": 1000 * statistics.median(alone for _, _, alone in rounds),
        "step_over_passes_within": statistics.median(ratios),
        "min_max": [ratios[0], ratios[-1]],
        "step_over_passes_alone": statistics.median(step / alone for step, _, alone in rounds),
        "beside_passes_ms": 1000 * statistics.median(step - passes for step, passes, _ in rounds),
        **{key: value for key, value in shape.items() if key.startswith("goal")},
    }


def watch_passes(trainer: Trainer) -> list[float]:
    """Seconds of each forward and each backward pass of the trainer's steps, as they come."""
    seconds: list[float] = []

    def timed(function: Any) -> Any:
        def call(argument: Any) -> Any:
            begun = time.perf_counter()
            answer = function(argument)
            seconds.append(time.perf_counter() - begun)
            return answer

        return call

    trainer._spread = timed(trainer._spread)
    trainer.engine.backward = timed(trainer.engine.backward)  # type: ignore[method-assign]
    return seconds


def main() -> None:
    """Measure all shapes; write and print the record."""
    torch.set_num_threads(1)
    rows = {name: measure(shape, STEPS_PER_ROUND[shape["layers"]]) for name, shape in SHAPES.items()}
    record = {"machine": describe_machine() | {"torch_threads": 1}, "results": rows, "peers": PEERS}
    write_record(Path(__file__).with_name("results") / "loop.json", record)


if __name__ == "__main__":
    main()
