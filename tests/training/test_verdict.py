"""What binds a step, on made-up numbers and on those that benchmarks/gpu measured."""

from __future__ import annotations

from typing import Any

import pytest

from finetrainers.training.verdict import Setting, Shares, verdict

GPU: dict[str, Any] = {"data": 0.0, "busy": 0.95, "mfu": 0.3, "hfu": 0.3}
CPU = GPU | {"busy": None}
CASES = {
    # LTX-Video 2B at 49x512x768 on an H200, eager and compiled: seconds of kernels over those of a step.
    "an H200, eager": (
        GPU | {"busy": 0.0975 / 0.2283, "mfu": 0.132, "hfu": 0.132},
        {},
        ["bound by launching kernels: the GPU is idle 57 % of a step; set training.cuda_graphs=true, which launches "
         "them at once, or set training.compile=blocks, or raise training.batch_size"],
    ),
    "an H200, compiled": (
        GPU | {"busy": 0.0687 / 0.1742, "mfu": 0.173, "hfu": 0.173},
        {"is_compiled": True},
        ["bound by launching kernels: the GPU is idle 61 % of a step; set training.cuda_graphs=true, which launches "
         "them at once, or raise training.batch_size"],
    ),
    "launched at once, and still idle": (
        GPU | {"busy": 0.6},
        {"is_compiled": True, "is_recorded": True},
        ["bound by launching kernels: the GPU is idle 40 % of a step; raise training.batch_size"],
    ),
    "arithmetic": (
        GPU | {"mfu": 0.62, "hfu": 0.62},
        {"is_compiled": True},
        ["bound by arithmetic: 62 % of the measured matmul rate; only fewer tokens (data.buckets) or more processes "
         "(--nproc) make it faster"],
    ),
    "arithmetic, a quarter of it again": (
        GPU | {"mfu": 0.45, "hfu": 0.6},
        {"is_compiled": True},
        ["bound by arithmetic: 60 % of the measured matmul rate; training.gradient_checkpointing=none, where memory "
         "allows, saves 25 % of its operations"],
    ),
    "memory traffic": (
        GPU,
        {"is_compiled": True},
        ["bound by memory traffic and small kernels: arithmetic reaches 30 % of the measured matmul rate; raise "
         "training.batch_size"],
    ),
    "memory traffic or communication": (
        GPU,
        {"num_processes": 8},
        ["bound by memory traffic and small kernels, or by what processes send each other: arithmetic reaches 30 % of "
         "the measured matmul rate; set training.compile=blocks, or raise training.batch_size, or "
         "training.gradient_accumulation_steps"],
    ),
    "data, and the GPU busy while it has some": (
        GPU | {"data": 0.31, "busy": 0.66, "mfu": 0.45, "hfu": 0.45},
        {},
        ["waits for data: 31 % of a step; raise data.num_workers from 2, or put data.cache on a faster disk",
         "the rest is bound by arithmetic: 65 % of the measured matmul rate; only fewer tokens (data.buckets) or more "
         "processes (--nproc) make it faster"],
    ),
    "data, and the GPU idle besides": (
        GPU | {"data": 0.31, "busy": 0.2},
        {"num_workers": 8},
        ["waits for data: 31 % of a step; put data.cache on a faster disk",
         "the rest is bound by launching kernels: the GPU is idle 49 % of a step; set training.cuda_graphs=true, "
         "which launches them at once, or set training.compile=blocks, or raise training.batch_size"],
    ),
    # The host reads the next batch while the GPU works on.
    "data that the GPU does not wait for": (
        GPU | {"data": 0.8, "busy": 0.97, "mfu": 0.7, "hfu": 0.7},
        {"num_workers": 0},
        ["bound by arithmetic: 70 % of the measured matmul rate; only fewer tokens (data.buckets) or more processes "
         "(--nproc) make it faster"],
    ),
    "a CPU that waits for data": (
        CPU | {"data": 0.5, "mfu": 0.1, "hfu": 0.1},
        {"num_workers": 0},
        ["waits for data: 50 % of a step; set data.num_workers=2, so that batches are read while a step runs",
         "the rest is bound by memory traffic and small operations: arithmetic reaches 20 % of the measured matmul "
         "rate; raise training.batch_size"],
    ),
    "a CPU, arithmetic": (
        CPU | {"mfu": 0.8, "hfu": 0.8},
        {},
        ["bound by arithmetic: 80 % of the measured matmul rate; only fewer tokens (data.buckets) or more processes "
         "(--nproc) make it faster"],
    ),
    "nothing but waiting": (
        CPU | {"data": 1.0},
        {},
        ["waits for data: 100 % of a step; raise data.num_workers from 2, or put data.cache on a faster disk"],
    ),
    "a family that cannot be counted": (
        GPU | {"mfu": None, "hfu": None},
        {},
        ["not told further, because this family's operations cannot be counted without its weights"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_binds(name: str) -> None:
    shares, setting, expected = CASES[name]
    options: dict[str, Any] = {"is_compiled": False, "is_recorded": False, "num_workers": 2, "num_processes": 1}
    assert verdict(Shares(**shares), Setting(**(options | setting))) == expected


@pytest.mark.parametrize(
    ("below", "above"),
    [
        (GPU | {"data": 0.1, "busy": 0.85}, GPU | {"data": 0.11, "busy": 0.85}),
        (GPU | {"busy": 0.699}, GPU | {"busy": 0.7}),
        (GPU | {"hfu": 0.499}, GPU | {"hfu": 0.5}),
    ],
)
def test_each_word_has_a_limit(below: dict[str, Any], above: dict[str, Any]) -> None:
    one, other = (verdict(Shares(**shares), Setting(False, False, 2, 1))[0] for shares in (below, above))
    assert one.split(":")[0] != other.split(":")[0]
