"""Memory of the device, bytes that cross between host and device, and the record of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
