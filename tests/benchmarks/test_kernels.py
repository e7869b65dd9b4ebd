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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "way"), ENTRIES)
def test_no_count_is_above_the_record(name, way):
    recorded = json.loads(RESULTS.read_text())["entries"][f"{name}, {way}"]
    counted = count(name, way)
    assert counted.keys() == recorded.keys()
    assert {key: value for key, value in counted.items() if value > 1.01 * recorded[key]} == {}
