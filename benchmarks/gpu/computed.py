"""What of a line is computed and not measured, on any CPU: the work of its step, the memory that the plan predicts, and
what share of each peak rate was reached."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import Line, newest
from benchmarks.gpu.measures import GIB
from benchmarks.gpu.models import open_config
from benchmarks.gpu.runs import RUNS, Run
from finetrainers.commands.completing import build_method
from finetrainers.config.schema import RunConfig
from finetrainers.families.find import hide_loading_bars
from finetrainers.methods.base import Method
from finetrainers.training.forecast import Work, simulate_step, training_phases
from finetrainers.training.operations import count_operations
from finetrainers.types import Bucket, Condition

VENDOR_PEAK = 989e12
"""Operations a second of an H100 or H200 in bf16, dense, as its vendor says."""


def complete_line(line: Line, lines: list[Line]) -> Line:
    """The line with what is computed of it; HFU takes the rate of the newest R0 among `lines`, those of its file. The
    line itself where it has all that, or no steps of training were measured.

    Raises UserError where its options are none that a config takes today.
    """
    kind = RUNS[line["run"]].kind if line["run"] in RUNS else None
    if kind not in ("train", "peft", "save") or "seconds" not in line or "mfu" in line:
        return line
    hide_loading_bars()
    with tempfile.TemporaryDirectory() as folder:
        family, config, bucket = open_config(run_of(line), Path(folder), is_tiny=line["tiny"])
        method = build_method(family, config)
        size, checkpointing = (bucket, Condition()), str(config.training.gradient_checkpointing)
        work = count_operations(method, [size], checkpointing=checkpointing)[size]
        # The plan is of our own steps.
        phase = None if kind == "peft" else _predict(method, config, bucket)
    seconds, held = line["seconds"]["median"], line["memory"]["max_allocated_gib"]
    matmul_rate = (newest(lines, "R0", tiny=line["tiny"]) or {}).get("matmul_rate")
    computed = {
        "flop": work.needed,
        "executed_flop": work.executed,
        "mfu": work.needed / seconds / VENDOR_PEAK,
        "hfu": matmul_rate and work.executed / seconds / matmul_rate,
    }
    if phase is not None:
        computed |= {"predicted_gib": phase.peak / GIB, "predicted_host_gib": phase.host / GIB}
        if held is not None:
            computed["predicted_error"] = computed["predicted_gib"] / held - 1
    return line | computed


def run_of(line: Line) -> Run:
    """The run as it was measured, whatever its name stands for by now."""
    options = {
        f"{section}.{key}": value for section, values in line["options"].items() for key, value in values.items()
    }
    return replace(RUNS[line["run"]], model=line["model"], size=line["size"], options=options)


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
