"""What binds a step of training, in words, and which option changes it."""

from __future__ import annotations

from dataclasses import dataclass

WAITS = 0.1
"""Waiting for data is worth a word from this share of a step on."""
BUSY = 0.7
"""A GPU that is busy less than this, of the time in which it has its data, waits for its kernels to be launched."""
ARITHMETIC = 0.5
"""From this share of the rate of large matrix products on, a step is mostly such products."""


@dataclass(frozen=True)
class Shares:
    """What a step spends its time on, each from 0 to 1."""

    data: float
    """Of the step, waiting for batches."""
    busy: float | None
    """Of the step, the GPU being at work; None on a CPU."""
    mfu: float | None
    """Of the matmul rate, by operations that are needed; None where they cannot be counted."""
    hfu: float | None
    """The same with those that are computed again."""


@dataclass(frozen=True)
class Setting:
    """The options of the run that could be changed."""

    is_compiled: bool
    is_recorded: bool
    """Whether passes are launched at once, as CUDA graphs."""
    num_workers: int
    num_processes: int


def verdict(shares: Shares, setting: Setting) -> list[str]:
    """One line, or two where the step waits for data too."""
    idle = 1.0 if shares.busy is None else max(1 - shares.busy, 0.0)
    # While the GPU still works on the step before, waiting for a batch costs nothing.
    waiting = min(shares.data, idle)
    if waiting <= WAITS:
        return [_binding(shares, setting, waiting=0.0)]
    mend = "put data.cache on a faster disk"
    if setting.num_workers == 0:
        mend = "set data.num_workers=2, so that batches are read while a step runs"
    elif setting.num_workers < 8:
        mend = f"raise data.num_workers from {setting.num_workers}, or {mend}"
    lines = [f"waits for data: {_percent(waiting)} of a step; {mend}"]
    if waiting < 1:
        lines.append(f"the rest is {_binding(shares, setting, waiting=waiting)}")
    return lines


def _binding(shares: Shares, setting: Setting, *, waiting: float) -> str:
    """What binds the part of the step that does not wait for data."""
    working = 1 - waiting
    if shares.busy is not None and shares.busy < BUSY * working:
        idle = _percent(working - shares.busy)
        mend = _fewer_kernels(setting)
        if not setting.is_recorded and setting.num_processes == 1:
            mend = f"set training.cuda_graphs=true, which launches them at once, or {mend}"
        return f"bound by launching kernels: the GPU is idle {idle} of a step; {mend}"
    if shares.mfu is None or shares.hfu is None:
        return "not told further, because this family's operations cannot be counted without its weights"
    reached = f"{_percent(shares.hfu / working)} of the measured matmul rate"
    if shares.hfu >= ARITHMETIC * working:
        saved = 1 - shares.mfu / shares.hfu
        mend = "only fewer tokens (data.buckets) or more processes (--nproc) make it faster"
        if saved > 0.01:
            mend = (
                f"training.gradient_checkpointing=none, where memory allows, saves {_percent(saved)} of its operations"
            )
        return f"bound by arithmetic: {reached}; {mend}"
    by, mend = "memory traffic and small kernels", _fewer_kernels(setting)
    if shares.busy is None:
        # Compiled blocks are for GPUs.
        by, mend = "memory traffic and small operations", "raise training.batch_size"
    elif setting.num_processes > 1:
        by += ", or by what processes send each other"
        mend += ", or training.gradient_accumulation_steps"
    return f"bound by {by}: arithmetic reaches {reached}; {mend}"


def _fewer_kernels(setting: Setting) -> str:
    return (
        "raise training.batch_size"
        if setting.is_compiled
        else "set training.compile=blocks, or raise training.batch_size"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
