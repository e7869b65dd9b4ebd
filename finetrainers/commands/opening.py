"""The beginning of a run: its model's family, its config made whole and fitted to the memory, its processes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection

import torch

from finetrainers.commands.completing import build_method, check_weights, complete
from finetrainers.commands.fit import fit, given_options
from finetrainers.config.schema import ParallelConfig, RunConfig
from finetrainers.engines.base import Engine
from finetrainers.engines.build import build_engine, pick_strategy
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.memory.checkpointing import draws
from finetrainers.memory.report import device_gib
from finetrainers.methods.base import Method
from finetrainers.optimizers.build import can_be_shared, check_optimizer
from finetrainers.planning import states_gib
from finetrainers.training.attention import check_attention
from finetrainers.training.compiling import check_compiling
from finetrainers.training.float8 import check_float8
from finetrainers.training.streaming import check_streaming

logger = logging.getLogger(__name__)


def open_run(config: RunConfig, *, trains: bool = True) -> tuple[Family, RunConfig, Engine]:
    """What a run stands on. Its config has every option that is left to family, optimizer or memory; what cannot work
    together is refused, before anything slow."""
    family, whole = complete(config)
    engine = build_engine(plain_strategy(family, whole) if trains else whole.parallel)
    if trains:
        check_float8(build_method(family, whole), engine)
    if whole.memory.budget is not None:
        # Chosen once, where devices may differ.
        fitted = choose_measures(family, whole, engine, given=given_options(config)) if engine.is_main else None
        whole = engine.gather(fitted)[0]
        family, _ = complete(whole)
    if trains:
        check_options(family, whole, engine)
    return family, whole, engine


def choose_measures(family: Family, config: RunConfig, engine: Engine, *, given: Collection[str]) -> RunConfig:
    """The config fitted to `memory.budget`, and the plan said."""
    fitted, plan = fit(family, config, given=given, check=functools.partial(check_options, family, engine=engine))
    for line in plan.lines():
        logger.info("%s", line)
    return fitted


def plain_strategy(family: Family, config: RunConfig) -> ParallelConfig:
    """The `parallel` section with `auto` made plain, where there are several processes: by what each would hold."""
    if config.parallel.strategy != "auto" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return config.parallel
    method = build_method(family, config)
    models = method.build()
    with torch.device("meta"):
        method.attach(models, seed=0)
    needed = states_gib(
        models,
        weights_dtype=method.weights_dtype,
        trained_dtype=method.trained_dtype,
        optimizer=config.optimizer.name,
    )
    strategy = pick_strategy(needed, device_gib())
    if (
        "transformer_2" in models
        or config.memory.base_weights
        or config.memory.stream_blocks
        or not can_be_shared(config.optimizer, weights_dtype(config))
    ):
        strategy = "ddp"  # The only one that has them.
    logger.info(
        "parallel.strategy auto is %s: weights, gradients and optimizer state are %.3g GiB, the device has %.3g GiB",
        strategy,
        needed,
        device_gib(),
    )
    return config.parallel.model_copy(update={"strategy": strategy})


def check_options(family: Family, config: RunConfig, engine: Engine) -> None:
    """Refuse what these processes cannot do."""
    check_weights(config)
    check_optimizer(
        config.optimizer,
        config.training,
        weights_dtype=weights_dtype(config),
        shares=engine.shares,
        num_processes=engine.world_size,
    )
    check_rescue(config, engine)
    method = build_method(family, config)
    check_recording(config, engine, method)
    check_attention(config.training.attention, engine.device)
    check_compiling(str(config.training.compile), engine)
    check_streaming(method, engine, config.memory, checkpointing=config.training.gradient_checkpointing)


def check_rescue(config: RunConfig, engine: Engine) -> None:
    """Refuse to repeat steps where a failed one leaves something behind, and gradients that nobody applies."""
    optimizer, memory = config.optimizer, config.memory
    if memory.on_oom == "adapt" and engine.world_size > 1:
        raise UserError(
            "memory.on_oom adapt is for one process, because the others would wait for the one that repeats its step: "
            "take memory.budget auto, which chooses before the run, or leave it out"
        )
    if memory.on_oom == "adapt" and optimizer.in_backward:
        raise UserError(
            "memory.on_oom adapt cannot repeat a step of which optimizer.in_backward has applied a part: leave one out"
        )
    if memory.stream_blocks and optimizer.in_backward and config.method.name == "full":
        raise UserError(
            "optimizer.in_backward has no gradients to apply on the device where memory.stream_blocks sends those of "
            "streamed blocks to the host: leave one out"
        )


def check_recording(config: RunConfig, engine: Engine, method: Method) -> None:
    """Refuse to record passes that are not the same each time, or whose tensors move."""
    if not config.training.cuda_graphs:
        return
    models = method.build()
    with torch.device("meta"):
        method.attach(models, seed=0)
    blocks = [block for name, model in models.items() for block in method.family.blocks(name, model)]
    again = str(config.training.gradient_checkpointing) != "none"
    optimizer, memory = config.optimizer, config.memory
    obstacles = {
        "takes an NVIDIA GPU: leave it out": engine.device.type != "cuda",
        "is for one process: leave it out": engine.world_size > 1 or engine.shares,
        "is not for two experts, of which noise levels choose one: name one with model.experts": models.keys()
        >= {"transformer", "transformer_2"},
        "is not for a text encoder that learns: set method.text_encoder frozen": method.trains_text_encoder,
        "is not for weights that move: leave memory.stream_blocks out": bool(memory.stream_blocks),
        "is not for activations that move: leave memory.offload_activations out": memory.offload_activations,
        "is not for gradients that are applied as they come: leave optimizer.in_backward out": optimizer.in_backward,
        "cannot take memory.on_oom adapt, after which other activations are kept: leave it out": memory.on_oom
        == "adapt",
        "cannot draw the same dropout again: set method.dropout 0, or training.gradient_checkpointing none": again
        and any(map(draws, blocks)),
    }
    for reason, is_met in obstacles.items():
        if is_met:
            raise UserError(f"training.cuda_graphs {reason}")


def weights_dtype(config: RunConfig) -> str | None:
    """The value of `method.weights_dtype`, where the method has it."""
    return getattr(config.method, "weights_dtype", None)
