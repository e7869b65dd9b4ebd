"""Instruments: moments on the device, what it is busy with, and the rate at which it multiplies matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Marks moments in the device's work without waiting for it; how far they lie apart is asked at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Any] = []

    def mark(self) -> None:
        """What was given to the device before comes before this moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each moment and the next."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(self._moments)]
        return [second - first for first, second in pairwise(self._moments)]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and 95th percentile, and all of them; of two or more."""
    return {
        "median": statistics.median(seconds),
        "p95": statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        "all": [round(each, 6) for each in seconds],
    }


def median_seconds(run: Callable[[], Any], device: torch.device, *, warm_up: int, timed: int) -> float:
    """What `run` takes on the device, after some runs that are not timed."""
    clock = Clock(device)
    for _ in range(warm_up):
        run()
    clock.mark()
    for _ in range(timed):
        run()
        clock.mark()
    return statistics.median(clock.seconds())


def matmul_rate(side: int, dtype: torch.dtype, device: torch.device, *, warm_up: int, timed: int) -> float:
    """Operations a second of a product of two square matrices, a multiplication and an addition being two."""
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: first @ second, device, warm_up=warm_up, timed=timed)


def profiled(step: Callable[[], Any], *, most: int = 15) -> dict[str, Any]:
    """What a CUDA device does in one more step: kernels, their seconds, those during which anything ran or was copied,
    and the kernels that take longest. Copies and fills of memory count as kernels."""
    from torch.profiler import ProfilerActivity, profile

    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    kernels: dict[str, list[float]] = {}
    ran = []
    for event in record.events():
        # Named stretches, such as an optimizer's step, stand among the kernels that they name.
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            kernels.setdefault(event.name[:100], []).append(event.time_range.elapsed_us() / 1e6)
            ran.append((event.time_range.start, event.time_range.end))
    longest = sorted(kernels.items(), key=lambda entry: -sum(entry[1]))[:most]
    return {
        "kernels": sum(map(len, kernels.values())),
        "kernel_seconds": sum(map(sum, kernels.values())),
        "busy_seconds": covered(ran) / 1e6,
        "wall_seconds": wall,
        "longest": [{"name": name, "count": len(each), "seconds": sum(each)} for name, each in longest],
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line spans from start to end cover, where they overlap once: kernels of several streams run at a
    time."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
