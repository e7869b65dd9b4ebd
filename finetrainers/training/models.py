"""The models of a run: loaded, made to train by the method, and brought to the device as the memory options say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.engines.context import split_tokens
from finetrainers.hashing import seed_for
from finetrainers.memory.quantized import describe
from finetrainers.methods.base import Method
from finetrainers.training.compiling import compile_blocks
from finetrainers.training.float8 import tell_float8
from finetrainers.training.measures import lower_precision, save_activations
from finetrainers.training.streaming import build_streams

logger = logging.getLogger(__name__)

Models = dict[str, nn.Module]


def load_models(
    method: Method,
    engine: Engine,
    *,
    options: Any,
    seed: int,
    checkpointing: str,
    kept_in: Path,
    compiles: bool = False,
) -> tuple[Models, dict[str, nn.Parameter]]:
    """The models on their device and the parameters of them that move; `options` are the config's `memory` section.
    What is to be kept of weights in low precision lies in the folder `kept_in`. With `compiles`, blocks of transformers
    are compiled."""
    models = method.load(engine.device) if engine.is_main else method.build()
    method.attach(models, seed_for(seed, "adapters"))
    num_all = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
    # The others get from the main process what it makes of weights.
    at_work = engine.device if engine.is_main else torch.device("meta")
    kept = kept_in if options.keep_quantized and engine.is_main else None
    lower_precision(method, models, options.base_weights, device=at_work, kept_in=kept)
    if options.base_weights is not None:
        logger.info("%s", describe(models.values()))
    save_activations(method, models, checkpointing=checkpointing, offload=options.offload_activations)
    transformers = [model for name, model in models.items() if name.startswith("transformer")]
    if engine.context_size > 1:
        split_tokens(transformers, method.family.context_plan(), device=engine.device, size=engine.context_size)
    blocks = {name: method.family.blocks(name, model) for name, model in models.items()}
    tell_float8(method, [block for each in blocks.values() for block in each])
    streams = build_streams(method, models, blocks, options=options, device=engine.device)
    for stream in streams:
        engine.park(stream)
    engine.prepare(models, blocks, None if compiles else method.linear_dtype)
    for stream in streams:
        stream.start()
    if compiles:
        compile_blocks(block for name in blocks if name.startswith("transformer") for block in blocks[name])
    trained = method.trained(models)
    _, num_trained = engine.held(trained.values())
    num_held, _ = engine.held(parameter for model in models.values() for parameter in model.parameters())
    logger.info("%s trains %s of %s parameters", method.name, f"{num_trained:,}", f"{num_all:,}")
    if engine.world_size > 1:
        logger.info("each of %d processes holds about %s of them", engine.world_size, f"{num_held:,}")
    return models, trained
