"""Steps of training, measured: our own code from the models' measures to the optimizer, on random weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu.measures import PCIE4, DeviceMemory, Record, counted_copies, host_memory
from benchmarks.gpu.models import OneBatch, open_config, random_batch, random_models
from benchmarks.gpu.runs import Run
from finetrainers.commands.completing import build_method
from finetrainers.commands.opening import check_options
from finetrainers.config.schema import RunConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.methods.base import Method
from finetrainers.optimizers.build import build_optimizer
from finetrainers.training.compiling import is_compiled
from finetrainers.training.instruments import Clock, profiled, spread
from finetrainers.training.models import load_models
from finetrainers.training.recorded import CudaGraphs
from finetrainers.training.schedule import build_schedule
from finetrainers.training.trainer import Trainer
from finetrainers.types import Bucket

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
        on_device = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
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
        recorder=CudaGraphs(engine.device) if config.training.cuda_graphs else None,
    )
    trainer.set_training(True)
    bench.record.put(load=memory.read())
    return trainer, memory


def _open(run: Run, bench: Bench) -> tuple[Method, RunConfig, Bucket]:
    family, config, bucket = open_config(run, bench.folder, is_tiny=bench.is_tiny)
    method = build_method(family, config)
    options = config.model_dump(mode="json", include={"method", "optimizer", "training", "memory"})
    bench.record.put(options=options, size=str(bucket), tokens=family.num_tokens(bucket))
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
        compiles=is_compiled(str(config.training.compile), engine, method.linear_dtype),
    )


def _measure_steps(step: Step, bench: Bench, memory: DeviceMemory, device: torch.device) -> float:
    """Take the steps and write down what they took. Returns the median's seconds."""
    memory.begin()
    clock = Clock(device)
    begun = time.perf_counter()
    losses = [step() for _ in range(bench.warm_up)]
    losses[-1].item()
    bench.record.put(warm_up_seconds=time.perf_counter() - begun)
    clock.mark()
    for _ in range(bench.timed):
        losses.append(step())
        clock.mark()
    seconds = spread(clock.seconds())
    held = memory.read()
    rate = bench.record.values["tokens"] / seconds["median"]
    bench.record.put(seconds=seconds, tokens_per_second=rate, memory=held, host=host_memory())
    last = losses[-1].item()
    assert math.isfinite(last), f"the loss of random weights is {last}"
    if device.type == "cuda":
        bench.record.put(profile=profiled(step))
    # Its hook sees nothing within what is compiled; eager blocks copy the same.
    with counted_copies() as copies, torch.compiler.set_stance("force_eager"):
        step()
    moved = {"to_device": copies.to_device, "to_host": copies.to_host}
    bench.record.put(loss=last, moved_bytes=moved, moved_seconds_at_25_gb=max(moved.values()) / PCIE4)
    return float(seconds["median"])
