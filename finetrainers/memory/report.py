"""What a run holds in memory, phase by phase: on a CUDA device its allocator's count, on a CPU the process's size."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: since the last phase on a CUDA device, since the process began on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def allocated_gib(device: torch.device) -> float:
    """Memory held now. Where the system does not tell a process its size (outside Linux), the peak stands in for it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / _GIB
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_gib(device)
    return int(statm.read_text().split()[1]) * resource.getpagesize() / _GIB


def reserved_gib(device: torch.device) -> float | None:
    """What the allocator of a CUDA device keeps, tensors and the gaps between them; None on a CPU, which has none."""
    return torch.cuda.memory_reserved(device) / _GIB if device.type == "cuda" else None


def peak_reserved_gib(device: torch.device) -> float | None:
    """The most that it kept since the last phase."""
    return torch.cuda.max_memory_reserved(device) / _GIB if device.type == "cuda" else None


def device_gib() -> float:
    """Memory of this process's device; on a CPU, its share of the host's among the processes started there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory / _GIB
    whole = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() / _GIB
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Held:
    """Bytes on the device, by what they are."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def parts(self) -> dict[str, int]:
        """By name, those that there are."""
        return {name: size for name, size in asdict(self).items() if size}


def held(models: Iterable[nn.Module], optimizer: torch.optim.Optimizer, device: torch.device) -> Held:
    """What this process's device holds of models that are trained."""
    parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}
    buffers = {id(buffer): buffer for model in models for buffer in model.buffers()}
    state = {id(value): value for entry in optimizer.state.values() for value in entry.values()}
    return Held(
        weights=_bytes_on(device, [*parameters.values(), *buffers.values()]),
        gradients=_bytes_on(device, [each.grad for each in parameters.values()]),
        optimizer=_bytes_on(device, state.values()),
    )


def _bytes_on(device: torch.device, values: Iterable[Any]) -> int:
    """Of what a process holds: of sharded tensors its share."""
    tensors = [value.to_local() if hasattr(value, "to_local") else value for value in values if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)


class MemoryReport:
    """Writes a row per phase of a run, so that one can see which of them sets the peak."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        """Without a path nothing is written: of several processes the main one reports."""
        self._path = path
        self._device = device
        self._begun = time.monotonic()

    def phase(self, name: str, held: Held | None = None) -> None:
        """Write down what the phase that ends here held, by part where those are given, and begin a new peak for the
        next (on a CUDA device)."""
        row: dict[str, str | float] = {
            "phase": name,
            "allocated_gib": allocated_gib(self._device),
            "peak_gib": peak_memory_gib(self._device),
        }
        if held is not None:
            row |= {f"{part}_gib": size / _GIB for part, size in asdict(held).items()}
        if (reserved := reserved_gib(self._device)) is not None:
            row["reserved_gib"] = reserved
            torch.cuda.reset_peak_memory_stats(self._device)
        row["seconds"] = time.monotonic() - self._begun
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        parts = "" if held is None else "".join(f", {part} {size / _GIB:.2f}" for part, size in held.parts.items())
        logger.info("Memory, %s: %.2f GiB held%s, %.2f GiB at most", name, row["allocated_gib"], parts, row["peak_gib"])
