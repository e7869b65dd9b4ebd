"""Blocks of the transformers compiled by torch: each kind once, for all layers that are alike."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.errors import UserError

logger = logging.getLogger(__name__)

_OLDEST = (7, 0)
"""Compute capability of a GPU."""
_CASES = 1024
"""Of one kind of block, what it may be compiled for: sizes, batches, with gradients and without. More is an error."""

_SIMD = 1
"""Bits of a CPU's vectors that inductor may use: none. With them torch 2.13 makes a wrong gradient of HunyuanVideo's
hidden states, by 4 %. Kernels for GPUs are not affected."""

_KEEP_LESS = {"ban_recompute_materialized_backward": False}
"""What torch is told of choosing what a compiled block keeps for its backward pass: what is cheap, such as norms,
activations, modulation and copies in another layout, is computed again even where a matrix product or attention reads
it, so that it has to be written again. Matrix products and attention themselves are never computed again."""


def check_compiling(option: str, engine: Engine) -> None:
    """Raise UserError where `training.compile` asks for blocks that cannot be compiled."""
    if option == "blocks" and (reason := _obstacle(engine, None)):
        raise UserError(f"training.compile blocks: {reason}; set training.compile off")


def is_compiled(option: str, engine: Engine, dtype: torch.dtype | None) -> bool:
    """What `training.compile` comes to. `dtype` is what `Engine.prepare` takes, and takes no more where blocks are
    compiled: what an engine would do with it within them, `auto` leaves to it, and `blocks` does without."""
    if option == "off" or (option == "auto" and engine.device.type != "cuda"):
        return False
    reason = _obstacle(engine, None)
    if reason is None and option == "auto" and (reason := _obstacle(engine, dtype)):
        reason += "; training.compile=blocks does without"
    if reason:
        logger.info("blocks are not compiled: %s", reason)
    return reason is None


def _obstacle(engine: Engine, dtype: torch.dtype | None) -> str | None:
    """Why blocks cannot be compiled, or None."""
    if reason := engine.within_blocks(dtype):
        return reason
    if engine.device.type == "cpu":
        found = any(map(shutil.which, ("g++", "clang++", "c++")))
        return None if found else "there is no C++ compiler (g++), which compiles for CPUs"
    if find_spec("triton") is None:
        return "triton is not installed, which compiles for GPUs"
    if torch.cuda.get_device_capability(engine.device) < _OLDEST:
        return "triton compiles for GPUs of compute capability 7.0 and up"
    return None


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Let each block's forward pass, and its backward pass, be compiled when it first runs. Names of weights stay what
    they were, and what hangs on a block's call, such as its weights being fetched, stays outside.

    Each size of clips is compiled for when it is first seen, rather than one program for all, so that a run that goes
    on where another stopped has the same kernels, whatever it sees first. What was compiled is kept on disk for later
    runs: in `TORCHINDUCTOR_CACHE_DIR`, or under the user's cache folder.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_user_cache() / "finetrainers" / "compiled"))
    import torch._dynamo as dynamo
    from torch._functorch import config as partitioning

    # Past its limits torch would quietly compute without having compiled.
    limits = {"recompile_limit": _CASES, "accumulated_recompile_limit": _CASES, "fail_on_recompile_limit_hit": True}
    dynamo.config.load_config(limits)
    partitioning.load_config(_KEEP_LESS)
    _tell_compile_times()
    options: Any = {"cpp.simdlen": _SIMD} if backend == "inductor" else None
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend, options=options)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class _CompileTimes:
    """Says how long each compilation took; steps stand still for it."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._count = 0
        self._total = 0.0

    def start(self, args: Any) -> None:
        self._begun = time.perf_counter()

    def end(self, args: Any) -> None:
        seconds = time.perf_counter() - self._begun
        self._count, self._total = self._count + 1, self._total + seconds
        logger.info("compiled a block, case %d: %.1f s, %.1f s in all", self._count, seconds, self._total)


@functools.cache
def _tell_compile_times() -> None:
    from torch._dynamo.callback import callback_handler

    times = _CompileTimes()
    callback_handler.register_start_callback(times.start)
    callback_handler.register_end_callback(times.end)
