"""From `parallel.strategy` to the engine that runs it."""

from __future__ import annotations

import logging
import os

from finetrainers.engines.base import Engine
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError

logger = logging.getLogger(__name__)


def build_engine(strategy: str) -> Engine:
    """The engine for this process. Raises UserError for one that needs more processes than were started."""
    if strategy == "auto" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SingleEngine()
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"parallel.strategy {strategy} runs on several processes; start them with --nproc N or torchrun"
        )
    from finetrainers.engines.ddp import DDPEngine

    engine = DDPEngine()
    logger.info("ddp on %d processes", engine.world_size)
    return engine
