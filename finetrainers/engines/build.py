"""From `parallel.strategy` to the engine that runs it."""

from __future__ import annotations

import os

from finetrainers.engines.base import Engine
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError


def build_engine(strategy: str) -> Engine:
    """The engine for this process. Raises UserError when more processes were started than can work together."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"{world_size} processes were started, but this version trains in one; start `finetrainers train` without "
            "torchrun"
        )
    return {"auto": SingleEngine}[strategy]()
