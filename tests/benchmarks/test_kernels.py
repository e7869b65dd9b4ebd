"""Counts of kernels: right for a function that can be counted by hand, and for the published models what the record
says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.kernel_counter import KernelCounter, Launches
from benchmarks.kernel_counts import RESULTS, SIZES, WAYS, count
from finetrainers.memory.simulation import simulation

ROWS, WIDTH = 64, 512
HIDDEN = ROWS * WIDTH * 2
"""Bytes of one tensor of hidden states in bf16."""
QUICK = {("LTX-Video 2B", "eager, none"), ("LTX-Video 2B", "compiled, none")}
ENTRIES = [
    pytest.param(name, way, marks=() if (name, way) in QUICK else pytest.mark.slow) for name in SIZES for way in WAYS
]

GOALS: dict[str, dict[str, float]] = {
    "LTX-Video 2B": {"kernels": 3500, "moved_bytes": 80e9, "units_per_block": 22},
    "CogVideoX-2b": {"units_per_block": 14},
    "CogVideoX-5b": {"units_per_block": 14},
    "HunyuanVideo 13B": {"units_per_block": 15},
    "Wan 2.1 1.3B": {"units_per_block": 24},
}
"""The most, with compiled blocks and no checkpointing."""


def block(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer, an activation and a residual, and views that launch nothing."""
    return nn.functional.gelu(nn.functional.linear(hidden, weight, bias)).view(-1, WIDTH) + hidden.t().t()


def launched(run: Callable[..., Tensor], counter: KernelCounter, *, times: int = 1) -> Launches:
    """What `block`, run as it is or compiled, launches in a forward and a backward pass."""
    with simulation():
        made: dict[str, Any] = {"dtype": torch.bfloat16}
        hidden = torch.empty(ROWS, WIDTH, requires_grad=True, **made)
        weight, bias = torch.empty(WIDTH, WIDTH, **made), torch.empty(WIDTH, **made)
        gradient = torch.empty(ROWS, WIDTH, **made)
        with counter.counted():
            for _ in range(times):
                hidden.grad = None
                run(hidden, weight, bias).backward(gradient)
    return counter.launches


def test_operations_are_counted():
    """gelu reads one tensor and writes one; the sum, gelu's gradient and the sum of gradients read two, write one."""
    assert launched(block, KernelCounter()) == Launches(matmuls=2, others=4, moved_bytes=(2 + 3 * 3) * HIDDEN)


@pytest.mark.parametrize("times", [1, 3])
def test_programs_are_counted_fused(times):
    """Besides matrix products, which add the bias and sum the gradients: gelu and the sum at once, and gelu's gradient;
    both read two tensors and write one."""
    torch.compiler.reset()
    counter = KernelCounter()
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend=counter.backend)
    expected = Launches(matmuls=2 * times, others=2 * times, moved_bytes=times * 2 * 3 * HIDDEN)
    assert launched(compiled, counter, times=times) == expected
    assert len(counter.programs) == 2


def too_much(counts: dict[str, float], most: dict[str, float]) -> dict[str, float]:
    """Those of the counts that are above what is allowed, where there is a limit."""
    return {key: counts[key] for key, limit in most.items() if counts[key] > limit}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "way"), ENTRIES)
def test_no_count_is_above_the_record_or_the_goal(name, way):
    recorded = json.loads(RESULTS.read_text())["entries"][f"{name}, {way}"]
    counted = count(name, way)
    assert counted.keys() == recorded.keys()
    assert too_much(counted, {key: 1.01 * value for key, value in recorded.items()}) == {}
    assert too_much(counted, GOALS[name] if way == "compiled, none" else {}) == {}


@pytest.mark.parametrize("name", SIZES)
def test_the_record_meets_the_goals(name):
    assert too_much(json.loads(RESULTS.read_text())["entries"][f"{name}, compiled, none"], GOALS[name]) == {}
