"""Steps of training, measured: our own code from the models' measures to the optimizer, on random weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.measures import (
    GIB,
    PCIE4,
    VENDOR_PEAK,
    Clock,
    DeviceMemory,
    Record,
    counted_copies,
    host_memory,
    spread,
)
from benchmarks.gpu.models import OneBatch, open_config, random_batch, random_models
from benchmarks.gpu.runs import Run
from finetrainers.commands.completing import build_method
from finetrainers.commands.opening import check_options
from finetrainers.config.schema import RunConfig
from finetrainers.data.batch import map_tensors
from finetrainers.engines.single import SingleEngine
from finetrainers.methods.base import Method
from finetrainers.optimizers.build import build_optimizer
from finetrainers.planning import count_flop
from finetrainers.training.forecast import Work, simulate_step, training_phases
from finetrainers.training.measures import save_activations
from finetrainers.training.models import load_models
from finetrainers.training.schedule import build_schedule
from finetrainers.training.simulated import meta_models
from finetrainers.training.trainer import Trainer
from finetrainers.types import Bucket, Condition

SEED = 0
Step = Callable[[], Tensor]
"""Takes a step, and gives its loss, on the device."""


@dataclass(frozen=True)
class Bench:
    """Where a run is measured, and how long."""

    record: Record
    folder: Path
    """Empty, and gone after the run."""
    is_tiny: bool
    warm_up: int
    timed: int
    matmul_rate: float | None
    """Operations a second that the device was measured to reach; None where it was not."""


def measure_training(run: Run, bench: Bench) -> None:
    """Time and memory of a step."""
    trainer, memory = prepare(run, bench)
    stream = trainer.batches.start(0)
    _measure_steps(lambda: trainer.step(stream).loss, bench, memory, trainer.engine.device)


def measure_peft(run: Run, bench: Bench) -> None:
    """The same of a plain loop around diffusers and PEFT as they are: adapters compute in fp32, torch's own clipping
    and AdamW."""
    from peft import LoraConfig

    method, config, bucket = _open(run, bench)
    device = SingleEngine().device
    memory = _memory(run, device)
    (name, transformer), *_ = random_models(method, device=device, seed=SEED).items()
    adapters = LoraConfig(
        r=run.options["method.rank"], lora_alpha=run.options["method.rank"], target_modules=config.method.target_modules
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(adapters)
    transformer.to(device).train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr)
    batch = random_batch(method, bucket, device=device, seed=SEED)

    def step() -> Tensor:
        on_device = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
        loss = method.loss({name: transformer}, on_device).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    bench.record.put(load=memory.read())
    _measure_steps(step, bench, memory, device)


def measure_saving(run: Run, bench: Bench) -> None:
    """How long the steps of training stand still for a checkpoint that is written meanwhile."""
    trainer, memory = prepare(run, bench)
    stream = trainer.batches.start(0)

    def step() -> Tensor:
        return trainer.step(stream).loss

    usual = _measure_steps(step, bench, memory, trainer.engine.device)
    memory.begin()
    begun = time.perf_counter()
    wait = trainer.engine.save(trainer.trained, trainer.optimizer, bench.folder)
    copying = time.perf_counter() - begun
    clock = Clock(trainer.engine.device)
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(wait)
        clock.mark()
        # As many as the write takes; one at least.
        for _ in range(bench.timed):
            step()
            clock.mark()
            if writing.done():
                break
        beside = clock.seconds()
        writing.result()
    bench.record.put(
        save={
            "copying_seconds": copying,
            "stall_seconds": copying + sum(max(seconds - usual, 0.0) for seconds in beside),
            "steps_meanwhile": len(beside),
            "whole_seconds": time.perf_counter() - begun,
        }
    )


def prepare(run: Run, bench: Bench) -> tuple[Trainer, DeviceMemory]:
    """A trainer as a run has it, but for files; what is known before its first step goes to the record."""
    method, config, bucket = _open(run, bench)
    engine = SingleEngine()
    check_options(method.family, config, engine)
    phase = _predict(method, config, bucket)
    bench.record.put(predicted_gib=phase.peak / GIB, predicted_host_gib=phase.host / GIB)
    memory = _memory(run, engine.device)
    models, trained = _load(method, config, engine, bench.folder)
    optimizer = build_optimizer(trained, config.optimizer, seed=SEED)
    steps = bench.warm_up + bench.timed
    trainer = Trainer(
        method=method,
        models=models,
        trained=trained,
        batches=OneBatch(random_batch(method, bucket, device=engine.device, seed=SEED)),  # type: ignore[arg-type]
        optimizer=optimizer,
        schedule=build_schedule("constant", optimizer, warmup_steps=0, steps=steps),
        engine=engine,
        callbacks=(),
        steps=steps,
        gradient_accumulation_steps=1,
        max_grad_norm=config.training.max_grad_norm,
        seed=SEED,
    )
    trainer.set_training(True)
    bench.record.put(load=memory.read())
    return trainer, memory


def _open(run: Run, bench: Bench) -> tuple[Method, RunConfig, Bucket]:
    family, config, bucket = open_config(run, bench.folder, is_tiny=bench.is_tiny)
    method = build_method(family, config)
    options = config.model_dump(mode="json", include={"method", "optimizer", "training", "memory"})
    bench.record.put(options=options, size=str(bucket), tokens=family.num_tokens(bucket))
    needed, executed = _count_work(method, config, bucket)
    bench.record.put(flop=needed, executed_flop=executed)
    return method, config, bucket


def _memory(run: Run, device: torch.device) -> DeviceMemory:
    memory = DeviceMemory(device)
    if run.card_gib is not None:
        memory.limit(run.card_gib)
    memory.begin()
    return memory


def _load(
    method: Method, config: RunConfig, engine: SingleEngine, folder: Path
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """As a run loads its models, with random weights in the place of those of a file."""

    def load(device: torch.device) -> dict[str, nn.Module]:
        return random_models(method, device=device, seed=SEED)

    method.load = load  # type: ignore[method-assign]
    return load_models(
        method,
        engine,
        options=config.memory,
        seed=SEED,
        checkpointing=str(config.training.gradient_checkpointing),
        kept_in=folder,
    )


def _predict(method: Method, config: RunConfig, bucket: Bucket) -> Any:
    """What the plan says of the training phase."""
    work = Work(method, bucket, Condition(), batch_size=1, sampled=None, validates=False)
    step = simulate_step(
        work,
        checkpointing=str(config.training.gradient_checkpointing),
        memory=config.memory,
        release=config.optimizer.in_backward,
    )
    return training_phases(step, None, memory=config.memory, optimizer=config.optimizer)[0]


def _count_work(method: Method, config: RunConfig, bucket: Bucket) -> tuple[float, float]:
    """Operations of a step's passes: as few as there must be, and with what is computed again."""

    def counted(checkpointing: str) -> float:
        ours, models = meta_models(method)
        save_activations(ours, models, checkpointing=checkpointing, offload=False)
        return count_flop(ours.family, models, bucket, Condition())[1]

    checkpointing = str(config.training.gradient_checkpointing)
    needed = counted("none")
    return needed, needed if checkpointing == "none" else counted(checkpointing)


def _measure_steps(step: Step, bench: Bench, memory: DeviceMemory, device: torch.device) -> float:
    """Take the steps and write down what they took. Returns the median's seconds."""
    memory.begin()
    clock = Clock(device)
    losses = [step() for _ in range(bench.warm_up)]
    clock.mark()
    for _ in range(bench.timed):
        losses.append(step())
        clock.mark()
    seconds = spread(clock.seconds())
    held = memory.read()
    values = bench.record.values
    rates = {
        "tokens_per_second": values["tokens"] / seconds["median"],
        "mfu": values["flop"] / seconds["median"] / VENDOR_PEAK,
        "hfu": bench.matmul_rate and values["executed_flop"] / seconds["median"] / bench.matmul_rate,
    }
    bench.record.put(seconds=seconds, **rates, memory=held, host=host_memory())
    if held["max_allocated_gib"] is not None and "predicted_gib" in values:
        bench.record.put(predicted_error=values["predicted_gib"] / held["max_allocated_gib"] - 1)
    last = losses[-1].item()
    assert math.isfinite(last), f"the loss of random weights is {last}"
    with counted_copies() as copies:
        step()
    moved = {"to_device": copies.to_device, "to_host": copies.to_host}
    bench.record.put(loss=last, moved_bytes=moved, moved_seconds_at_25_gb=max(moved.values()) / PCIE4)
    return float(seconds["median"])
