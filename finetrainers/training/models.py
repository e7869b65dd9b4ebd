"""The models of a run: loaded, made to train by the method, and brought to the device as the memory options say."""

from __future__ import annotations

import logging
from typing import Any, cast

from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.engines.context import split_tokens
from finetrainers.hashing import seed_for
from finetrainers.methods.base import Method
from finetrainers.training.streaming import build_streams

logger = logging.getLogger(__name__)

Models = dict[str, nn.Module]


def load_models(
    method: Method, engine: Engine, *, options: Any, seed: int, checkpointing: bool
) -> tuple[Models, dict[str, nn.Parameter]]:
    """The models on their device and the parameters of them that move; `options` are the config's `memory` section."""
    models = method.load(engine.device) if engine.is_main else method.build()
    method.attach(models, seed_for(seed, "adapters"))
    save_memory(method, models, options=options, checkpointing=checkpointing)
    transformers = [model for name, model in models.items() if name.startswith("transformer")]
    if engine.context_size > 1:
        split_tokens(transformers, method.family.context_plan(), device=engine.device, size=engine.context_size)
    blocks = {name: method.family.blocks(name, model) for name, model in models.items()}
    streams = build_streams(method, models, blocks, options=options, device=engine.device)
    for stream in streams:
        engine.park(stream)
    engine.prepare(models, blocks, method.linear_dtype)
    for stream in streams:
        stream.start()
    trained = method.trained(models)
    _, num_trained = engine.held(trained.values())
    num_held, num_all = engine.held(parameter for model in models.values() for parameter in model.parameters())
    logger.info("%s trains %s of %s parameters", method.name, f"{num_trained:,}", f"{num_all:,}")
    if engine.world_size > 1:
        logger.info("each of %d processes holds about %s of them", engine.world_size, f"{num_held:,}")
    return models, trained


def save_memory(method: Method, models: Models, *, options: Any, checkpointing: bool) -> None:
    """Put the measures that save memory into the models, to which the method is attached, on whatever device."""
    for name, model in models.items():
        if checkpointing and name.startswith("transformer"):
            cast(Any, model).enable_gradient_checkpointing()
