"""The models of a run: loaded, made to train by the method, and brought to the device as the memory options say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.engines.context import split_tokens
from finetrainers.hashing import digest, seed_for
from finetrainers.memory import quantized
from finetrainers.methods.base import Method
from finetrainers.training.kept import read_kept, write_kept

logger = logging.getLogger(__name__)

Models = dict[str, nn.Module]


def load_models(
    method: Method, engine: Engine, *, options: Any, seed: int, checkpointing: bool, kept_in: Path
) -> tuple[Models, dict[str, nn.Parameter]]:
    """The models on their device and the parameters of them that move; `options` are the config's `memory` section.
    What is to be kept of weights in low precision lies in the folder `kept_in`."""
    models = method.load(engine.device) if engine.is_main else method.build()
    method.attach(models, seed_for(seed, "adapters"))
    num_all = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
    # The others get from the main process what it makes of weights.
    at_work = engine.device if engine.is_main else torch.device("meta")
    kept = kept_in if options.keep_quantized and engine.is_main else None
    save_memory(method, models, options=options, checkpointing=checkpointing, device=at_work, kept_in=kept)
    transformers = [model for name, model in models.items() if name.startswith("transformer")]
    if engine.context_size > 1:
        split_tokens(transformers, method.family.context_plan(), device=engine.device, size=engine.context_size)
    blocks = {name: method.family.blocks(name, model) for name, model in models.items()}
    engine.prepare(models, blocks, method.linear_dtype)
    trained = method.trained(models)
    _, num_trained = engine.held(trained.values())
    num_held, _ = engine.held(parameter for model in models.values() for parameter in model.parameters())
    logger.info("%s trains %s of %s parameters", method.name, f"{num_trained:,}", f"{num_all:,}")
    if engine.world_size > 1:
        logger.info("each of %d processes holds about %s of them", engine.world_size, f"{num_held:,}")
    return models, trained


def save_memory(
    method: Method,
    models: Models,
    *,
    options: Any,
    checkpointing: bool,
    device: torch.device,
    kept_in: Path | None = None,
) -> None:
    """Put the measures that save memory into the models, to which the method is attached, on whatever device they are;
    what must be computed for it is computed on `device`."""
    for name, model in models.items():
        if not name.startswith("transformer"):
            continue
        if options.base_weights is not None:
            _quantize(method, name, model, options.base_weights, device=device, kept_in=kept_in)
        if checkpointing:
            cast(Any, model).enable_gradient_checkpointing()


def _quantize(
    method: Method, name: str, model: nn.Module, format: str, *, device: torch.device, kept_in: Path | None
) -> None:
    """Hold the frozen weights of a transformer's blocks in low precision; with a folder, keep them there."""
    family = method.family
    formats = quantized.choose_formats(
        model, family.blocks(name, model), format, precise=family.precise_layers, sensitive=family.sensitive_layers
    )
    kept, known = None, None
    if kept_in is not None:
        made_by = [quantized.VERSION, str(method.weights_dtype), device.type]
        kept = kept_in / f"{digest([family.fingerprint('transformer'), name, made_by, formats])}.safetensors"
        known = read_kept(kept, model, formats)
    held = quantized.quantize_layers(model, formats, device=device, known=known)
    if kept is not None and known is None:
        write_kept(kept, held)
