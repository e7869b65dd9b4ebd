"""Memory that is exhausted: recognised, and told by what was being done, what held it and what helps."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from finetrainers.errors import RunError
from finetrainers.memory.report import Held, allocated_gib, device_gib

_GIB = 2**30
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": _GIB}


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left: torch's own for a GPU, or what its allocator on the
    CPU says."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for when it failed; None if the error does not say."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error), re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def explain(error: BaseException, doing: str, device: torch.device, held: Held, advice: Sequence[str]) -> str:
    """One line for the user."""
    asked = asked_bytes(error)
    more = "" if asked is None else f", {asked / _GIB:.2f} GiB more were asked for"
    whole = allocated_gib(device)
    rest = max(whole - held.total / _GIB, 0.0)
    parts = [f"{name} {size / _GIB:.2f}" for name, size in held.parts.items()]
    parts.append(f"activations and all else {rest:.2f}")
    return (
        f"out of memory in {doing}{more}, and of {device_gib():.1f} GiB {whole:.2f} were held ({', '.join(parts)}). "
        f"What helps, the cheapest first: {', '.join(advice)}"
    )


@contextmanager
def told(doing: str, device: torch.device, *, advice: Sequence[str], held: Callable[[], Held] = Held) -> Iterator[None]:
    """Memory that is exhausted in the block ends the run with one line; `held` is asked only then.

    Raises RunError.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        raise RunError(explain(error, doing, device, held(), advice)) from error


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
