"""Instruments: moments on the device, memory, bytes that cross between host and device, and the record of a run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetrainers.memory.report import allocated_gib, peak_memory_gib

GIB = 2**30
PCIE4 = 25e9
"""Bytes a second that cross PCIe 4 in one direction."""
CPU = torch.device("cpu")


@dataclass
class Record:
    """What is known of a run so far. It is on disk at every moment, so that a run that dies says what it knew."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, **values: Any) -> None:
        """Add to it."""
        self.values |= values
        self.path.write_text(json.dumps(self.values))


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
    """Median and 95th percentile, and all of them."""
    return {
        "median": statistics.median(seconds),
        "p95": statistics.quantiles(seconds, n=20, method="inclusive")[-1],
        "all": [round(each, 6) for each in seconds],
    }


class DeviceMemory:
    """Memory of the device from here on; on a CPU there is nothing to tell of it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # Asking begins CUDA's own context, whose memory is then no part of the difference.
        self._free, self._total = torch.cuda.mem_get_info() if self._is_cuda else (0, 0)

    def limit(self, card_gib: float) -> None:
        """Let this process have what tensors may take of a smaller card: all but 1 GiB."""
        if self._is_cuda:
            torch.cuda.set_per_process_memory_fraction((card_gib - 1) * GIB / self._total)

    def begin(self) -> None:
        """Forget the peaks so far, once the device has done what it was given."""
        if self._is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, float | None]:
        """Peaks since `begin`, of tensors and of what the allocator held for them; and how much less is free now than
        at the very beginning."""
        if not self._is_cuda:
            return {"max_allocated_gib": None, "max_reserved_gib": None, "taken_gib": None}
        torch.cuda.synchronize()
        return {
            "max_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "max_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "taken_gib": (self._free - torch.cuda.mem_get_info()[0]) / GIB,
        }


def host_memory() -> dict[str, float]:
    """Of this process: now, and at most so far."""
    return {"now_gib": allocated_gib(CPU), "peak_gib": peak_memory_gib(CPU)}


@dataclass
class Copies:
    """Bytes copied between host and device."""

    to_device: int = 0
    to_host: int = 0

    def see(self, source: Tensor, target: Tensor) -> None:
        """Count a copy, if it goes from one to the other."""
        from_host, onto_host = source.device.type == "cpu", target.device.type == "cpu"
        if from_host and not onto_host:
            self.to_device += target.nbytes
        elif onto_host and not from_host:
            self.to_host += target.nbytes


@contextmanager
def counted_copies() -> Iterator[Copies]:
    """In the block, copies between host and device are counted, those of backward passes included; it takes time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    copies = Copies()
    within, anew = torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            answer = func(*args, **(kwargs or {}))
            if func is within:
                copies.see(args[1], args[0])
            elif func is anew:
                copies.see(args[0], answer)
            return answer

    with Watch():
        yield copies


def profiled(step: Callable[[], Any], *, most: int = 15) -> dict[str, Any]:
    """What the device does in one more step: kernels, their seconds, and those of the ones that take longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    kernels: dict[str, list[float]] = {}
    for event in record.events():
        if event.device_type == DeviceType.CUDA:
            kernels.setdefault(event.name[:100], []).append(event.time_range.elapsed_us() / 1e6)
    longest = sorted(kernels.items(), key=lambda entry: -sum(entry[1]))[:most]
    return {
        "kernels": sum(map(len, kernels.values())),
        "kernel_seconds": sum(map(sum, kernels.values())),
        "wall_seconds": wall,
        "longest": [{"name": name, "count": len(each), "seconds": sum(each)} for name, each in longest],
    }
