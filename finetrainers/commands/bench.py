"""`finetrainers bench`: the steps of a run measured on this machine, and what binds them."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from json import dumps
from tempfile import TemporaryDirectory

import torch

from finetrainers.commands.completing import DTYPES
from finetrainers.commands.forecasting import Forecaster
from finetrainers.commands.measured import Arithmetic, Kernels, Measured, Memory, Setup, Steps
from finetrainers.commands.opening import open_run
from finetrainers.commands.precompute import Prepared, encode
from finetrainers.commands.train import build_trainer, load
from finetrainers.config.schema import RunConfig
from finetrainers.data.batch import Size
from finetrainers.data.dataset import cache_folder
from finetrainers.folder import RunFolder
from finetrainers.training.attention import attention_by
from finetrainers.training.compiling import is_compiled
from finetrainers.training.instruments import matmul_rate, profiled, spread
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.operations import count_operations
from finetrainers.training.signals import StopSignals
from finetrainers.training.timing import Rounds, StepTimes, choose_steps, position_of, sizes_of_steps
from finetrainers.training.trainer import Trainer
from finetrainers.training.verdict import Setting, Shares, verdict

SIDES = {"cuda": 8192, "cpu": 1024}
"""Of the matrices whose product tells the rate of arithmetic, by the kind of device."""


def bench(config: RunConfig, *, steps: int, json: bool) -> int:
    """Take the first steps of a run, and print what they took: the main process does, for all."""
    # Libraries print too, and only the answer is to be read.
    with redirect_stdout(sys.stderr):
        measured = measure(config, steps=steps)
    if measured is not None:
        print(dumps(measured.as_dict(), indent=2) if json else "\n".join(measured.lines()))
    return 0


def measure(config: RunConfig, *, steps: int) -> Measured | None:
    """What so many steps take, on the main process. Nothing is left of them but the encoded dataset, where `train`
    looks for it."""
    with StopSignals() as signals, TemporaryDirectory(prefix="finetrainers-bench-") as folder:
        family, config, engine = open_run(put_aside(config, folder))
        # Before the models need the memory.
        rate = measure_rate(engine.device, config.training.precision)
        prepared = encode(family, config, engine)
        models, trained = load(prepared)
        times = StepTimes(engine.device)
        callbacks = [MetricsFile(prepared.run), times]
        trainer = build_trainer(prepared, models, trained, callbacks=callbacks, stop_requested=signals.requested)
        meetings = 2 if config.training.cuda_graphs else 1
        timed = choose_steps(sizes_of_steps(trainer), count=steps, meetings=meetings)
        trainer.steps = max(timed) + 1
        signals.defer()
        with attention_by(config.training.attention):
            trainer.fit()
            is_whole = not trainer.stopping
            kernels = profile_step(trainer, times, timed) if is_whole else Kernels()
        engine.close()
        signals.raise_if_requested()
        if engine.is_main and is_whole:
            return put_together(prepared, times, timed, rate=rate, kernels=kernels)
    return None


def put_aside(config: RunConfig, folder: str) -> RunConfig:
    """The config with its output in `folder`, and the encoded dataset where it has it."""
    cache = str(cache_folder(config.data, RunFolder(config.output).cache))
    return config.model_copy(update={"output": folder, "data": config.data.model_copy(update={"cache": cache})})


def measure_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a product of large matrices on this device, in the run's precision."""
    warm_up, timed = (20, 50) if device.type == "cuda" else (1, 5)
    return matmul_rate(SIDES[device.type], DTYPES[precision], device, warm_up=warm_up, timed=timed)


def profile_step(trainer: Trainer, times: StepTimes, timed: Mapping[int, Rounds]) -> Kernels:
    """Take the timed step of the median once more, on a GPU and under the profiler; how long it takes was measured
    without one."""
    if trainer.device.type != "cuda":
        return Kernels()
    seconds = times.seconds()
    median = statistics.median_low([seconds[number] for number in timed])
    # The same one on all processes.
    number = trainer.engine.gather(next(number for number in timed if seconds[number] == median))[0]
    stream = trainer.batches.start(position_of(number, trainer))
    profile = profiled(lambda: trainer.step(stream))
    busy_share = min(profile["busy_seconds"] / seconds[number], 1.0)
    return Kernels(profile["kernels"], profile["kernel_seconds"], busy_share)


def put_together(
    prepared: Prepared, times: StepTimes, timed: Mapping[int, Rounds], *, rate: float, kernels: Kernels
) -> Measured:
    """All that is told, from the times of every step and the sizes of those that are `timed`."""
    config, engine, family = prepared.config, prepared.engine, prepared.family
    sizes = Counter(sizes[engine.data_rank] for rounds in timed.values() for sizes in rounds)
    compiled = is_compiled(str(config.training.compile), engine, prepared.method.linear_dtype)
    setup = Setup(
        device=name_device(engine.device),
        processes=engine.world_size,
        family=family.name,
        method=config.method.name,
        precision=config.training.precision,
        compiled=compiled,
        cuda_graphs=config.training.cuda_graphs,
        gradient_checkpointing=str(config.training.gradient_checkpointing),
        sizes=[
            {
                "bucket": str(size.bucket),
                "condition": str(size.condition),
                "samples": size.num_samples,
                "batches": count,
            }
            for size, count in sizes.items()
        ],
    )
    tokens = sum(
        size.num_samples * family.num_tokens(size.bucket)
        for rounds in timed.values()
        for sizes in rounds
        for size in sizes
    )
    steps = time_steps(times, list(timed), tokens=tokens)
    predicted = Forecaster(family, config).training_gib(config) if family.runs_on_meta else None
    memory = Memory(times.peak_allocated_gib, times.peak_reserved_gib, predicted)
    arithmetic = Arithmetic.of(
        count_step(prepared, sizes, num_steps=steps.steps),
        seconds=steps.seconds / steps.steps,
        side=SIDES[engine.device.type],
        rate=rate,
    )
    shares = Shares(steps.data_share, kernels.busy_share, arithmetic.mfu, arithmetic.hfu)
    said = verdict(shares, Setting(compiled, config.training.cuda_graphs, config.data.num_workers, engine.world_size))
    return Measured(setup, steps, memory, arithmetic, kernels, said)


def name_device(device: torch.device) -> str:
    """As a person would."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


def time_steps(times: StepTimes, timed: Sequence[int], *, tokens: int) -> Steps:
    """The times of those that are `timed`, in which all processes saw so many tokens, and of the others."""
    every = times.seconds()
    seconds, outcomes = [every[number] for number in timed], [times.outcomes[number] for number in timed]
    waits = [outcome.data_time for outcome in outcomes]
    samples = sum(outcome.num_samples for outcome in outcomes)
    total, whole, waited = sum(seconds), spread(seconds), spread(waits)
    return Steps(
        steps=len(timed),
        first_step_seconds=every[0],
        warm_up_steps=len(every) - len(timed),
        warm_up_seconds=sum(every) - total,
        seconds=total,
        step_seconds_median=whole["median"],
        step_seconds_p95=whole["p95"],
        data_seconds_median=waited["median"],
        data_seconds_p95=waited["p95"],
        data_share=min(sum(waits) / total, 1.0),
        samples=samples,
        tokens=tokens,
        samples_per_second=samples / total,
        tokens_per_second=tokens / total,
    )


def count_step(prepared: Prepared, sizes: Mapping[Size, int], *, num_steps: int) -> tuple[float, float] | None:
    """Operations of a step of this process, needed and executed, from how often each size came in so many steps; None
    where the family cannot be counted."""
    if not prepared.family.runs_on_meta:
        return None
    checkpointing = str(prepared.config.training.gradient_checkpointing)
    kinds = list(dict.fromkeys((size.bucket, size.condition) for size in sizes))
    each = count_operations(prepared.method, kinds, checkpointing=checkpointing)
    # Processes that split a batch do a part of it each.
    share = 1 / (num_steps * prepared.engine.context_size)
    samples = {size: count * size.num_samples * share for size, count in sizes.items()}
    work = [(each[size.bucket, size.condition], number) for size, number in samples.items()]
    return sum(one.needed * number for one, number in work), sum(one.executed * number for one, number in work)
