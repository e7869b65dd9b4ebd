"""From `memory.stream_blocks` to the streams of a run's transformers, and what is refused of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.errors import UserError
from finetrainers.memory.layout import footprint, spread
from finetrainers.memory.streaming import BlockStream
from finetrainers.methods.base import Method

logger = logging.getLogger(__name__)

_GIB = 2**30


def check_streaming(method: Method, engine: Engine, options: Any, *, checkpointing: bool | str) -> None:
    """Raise UserError where what the config's `memory` section asks to stream cannot be. `checkpointing` is
    `training.gradient_checkpointing`."""
    if options.stream_text_encoder and method.trains_text_encoder:
        raise UserError(
            "memory.stream_text_encoder is for text encoders that only embed captions, and this run trains one, which "
            "stays on the device: leave it out, or set method.text_encoder frozen"
        )
    if not (count := options.stream_blocks):
        return
    key = f"memory.stream_blocks {count}"
    if checkpointing not in (True, "full"):
        raise UserError(
            f"{key} needs training.gradient_checkpointing full: a block's weights have left the device when its "
            "backward pass comes, and only what runs again as a whole fetches them"
        )
    if engine.shares or engine.context_size > 1:
        raise UserError(
            f"{key} is for one process and for parallel.strategy ddp, each with its own batches: fsdp and deepspeed "
            "keep weights on the host with parallel.offload parameters; leave memory.stream_blocks out"
        )
    if trains_blocks(method) and engine.world_size > 1:
        raise UserError(
            f"{key} with method {method.name} is for one process, because gradients go to its host: on several take "
            "parallel.strategy fsdp with parallel.offload parameters, and leave memory.stream_blocks out"
        )
    if count != "all":
        for name, model in method.build().items():
            if name.startswith("transformer") and count > (most := len(method.family.blocks(name, model))):
                raise UserError(f"{key}: {name} has {most} blocks; give as many at most, or `all`")


def trains_blocks(method: Method) -> bool:
    """Whether the blocks' own weights move, rather than adapters beside them."""
    return not method.saves_trained_only


def build_streams(
    method: Method,
    models: Mapping[str, nn.Module],
    blocks: Mapping[str, Sequence[nn.Module]],
    *,
    options: Any,
    device: torch.device,
) -> list[BlockStream]:
    """One for each transformer, of as many of its blocks as the config's `memory` section says; none where it says
    none. To be parked by the engine, and started once the models are on their device."""
    streams = []
    for name in (name for name in models if options.stream_blocks and name.startswith("transformer")):
        every, trained_too = blocks[name], trains_blocks(method)
        count = len(every) if options.stream_blocks == "all" else options.stream_blocks
        chosen = spread(every, count)
        size = footprint(models[name], chosen, trained_too=trained_too)
        logger.info(
            "%d of %d blocks of %s are streamed: %.3g GiB lie on the host, %.3g stay on the device, %.3g are at work",
            *(count, len(every), name, size.host / _GIB, size.resident / _GIB, size.ring / _GIB),
        )
        streams.append(BlockStream(chosen, device=device, trained_too=trained_too))
    return streams
