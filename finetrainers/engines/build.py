"""From `parallel.strategy` to the engine that runs it."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetrainers.engines.base import Engine
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError

logger = logging.getLogger(__name__)


def build_engine(options: Any) -> Engine:
    """The engine for this process, by the config's `parallel` section. Raises UserError for options that the strategy
    does not have, and for one that needs more processes than were started."""
    strategy = options.strategy
    if strategy == "auto":
        strategy = "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"
    check_options(strategy, options)
    if strategy == "single":
        return SingleEngine()
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"parallel.strategy {strategy} runs on several processes; start them with --nproc N or torchrun"
        )
    engine = _on_processes(strategy, options)
    logger.info("%s on %d processes", strategy, engine.world_size)
    return engine


_OPTIONS = {
    "context_parallel_size": ("ddp", "fsdp"),
    "shard_size": ("fsdp",),
    "offload": ("fsdp", "deepspeed"),
    "zero_stage": ("deepspeed",),
    "deepspeed_config": ("deepspeed",),
}
"""The strategies that have an option; the others refuse it."""


def pick_strategy(states_gib: float, device_gib: float) -> str:
    """`ddp` where weights, gradients and optimizer state fit the device beside the activations of a step, else `fsdp`.
    Where both fit, DDP is the faster: it sends gradients once a step, and no weights."""
    return "ddp" if states_gib <= _STATES_SHARE * device_gib else "fsdp"


_STATES_SHARE = 0.7
"""Of a device's memory; the rest is for activations, which gradient checkpointing keeps to a few layers'."""


def check_options(strategy: str, options: Any) -> None:
    """Raise UserError for an option that was set and that the strategy does not have."""
    defaults = type(options)()
    for name, strategies in _OPTIONS.items():
        if strategy not in strategies and getattr(options, name) != getattr(defaults, name):
            raise UserError(
                f"parallel.{name} is an option of parallel.strategy {' and '.join(strategies)}; this run is {strategy}"
            )
    if strategy == "fsdp" and options.offload == "optimizer":
        raise UserError("parallel.offload optimizer is for deepspeed; fsdp takes parameters, optimizer state included")
    if strategy == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError("parallel.strategy deepspeed needs DeepSpeed: pip install 'finetrainers[deepspeed]'")


def _on_processes(strategy: str, options: Any) -> Engine:
    # Each brings in much of torch.distributed.
    if strategy == "ddp":
        from finetrainers.engines.ddp import DDPEngine

        return DDPEngine(context_size=options.context_parallel_size)
    if strategy == "fsdp":
        from finetrainers.engines.fsdp import FSDPEngine

        return FSDPEngine(
            context_size=options.context_parallel_size,
            shard_size=options.shard_size,
            offload=options.offload == "parameters",
        )
    from finetrainers.engines.deepspeed import DeepSpeedEngine, read_user_settings, zero_settings

    user = read_user_settings(Path(options.deepspeed_config)) if options.deepspeed_config else None
    return DeepSpeedEngine(zero_settings(stage=options.zero_stage, offload=options.offload, user=user))
