"""The models of a run: loaded, made to train by the method, and brought to the device as the memory options say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.engines.context import split_tokens
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.hashing import seed_for
from finetrainers.memory.checkpointing import set_activations
from finetrainers.memory.offload import ActivationOffloader, HostMemory
from finetrainers.methods.base import Method

logger = logging.getLogger(__name__)

Models = dict[str, nn.Module]


def load_models(
    method: Method, engine: Engine, *, options: Any, seed: int, checkpointing: str
) -> tuple[Models, dict[str, nn.Parameter]]:
    """The models on their device and the parameters of them that move; `options` are the config's `memory` section."""
    models = method.load(engine.device) if engine.is_main else method.build()
    method.attach(models, seed_for(seed, "adapters"))
    save_memory(method, models, options=options, checkpointing=checkpointing)
    transformers = [model for name, model in models.items() if name.startswith("transformer")]
    if engine.context_size > 1:
        split_tokens(transformers, method.family.context_plan(), device=engine.device, size=engine.context_size)
    blocks = {name: method.family.blocks(name, model) for name, model in models.items()}
    engine.prepare(models, blocks, method.linear_dtype)
    trained = method.trained(models)
    _, num_trained = engine.held(trained.values())
    num_held, num_all = engine.held(parameter for model in models.values() for parameter in model.parameters())
    logger.info("%s trains %s of %s parameters", method.name, f"{num_trained:,}", f"{num_all:,}")
    if engine.world_size > 1:
        logger.info("each of %d processes holds about %s of them", engine.world_size, f"{num_held:,}")
    return models, trained


def save_memory(
    method: Method, models: Models, *, options: Any, checkpointing: str, host: torch.device | None = None
) -> None:
    """Put the measures that save memory into the models, to which the method is attached, on whatever device.
    `checkpointing` is `training.gradient_checkpointing`; `host` stands for the host where the device is simulated.

    Raises UserError when the blocks have no layers of the kind that is to be computed again.
    """
    memory = HostMemory(host)
    for name, model in models.items():
        if name.startswith("transformer"):
            blocks = method.family.blocks(name, model)
            offloader = ActivationOffloader(len(blocks), memory) if options.offload_activations else None
            layers = _layers(method.family, blocks, checkpointing)
            set_activations(model, blocks, checkpointing, layers=layers, offloader=offloader)


def _layers(family: Family, blocks: Sequence[nn.Module], checkpointing: str) -> list[nn.Module]:
    """The layers within blocks that are computed again by themselves."""
    kinds = {"attention": family.attention_layers, "feed_forward": family.feed_forward_layers}
    if checkpointing not in kinds:
        return []
    found = [layer for block in blocks for layer in kinds[checkpointing](block)]
    if not found:
        raise UserError(
            f"training.gradient_checkpointing {checkpointing}: {family.name} names no such layers of its blocks; take "
            "full, every-2 or none"
        )
    return found
