"""The step of a run on simulated tensors: the models as they are made to train, and a batch of zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy

import torch
from torch import nn

from finetrainers.families.parts import cast_as_loaded
from finetrainers.memory.simulation import SIMULATED, simulation
from finetrainers.methods.base import Method
from finetrainers.types import Batch, Bucket, Condition


@contextmanager
def simulated_models(
    method: Method, *, most_blocks: Mapping[str, int] | None = None
) -> Iterator[tuple[Method, dict[str, nn.Module]]]:
    """In the block, models without memory to which a method is attached, in the types in which they are loaded, and a
    method like the given one for them. Measures that save memory are still to be put in. Of the family's lists of
    blocks named in `most_blocks` only so many are there. A loss is to be asked of `one_expert` of the models.
    """
    ours, models = meta_models(method)
    for name, model in models.items():
        for blocks, most in (most_blocks or {}).items():
            if name.startswith("transformer"):
                setattr(model, blocks, getattr(model, blocks)[:most])
    with simulation():
        for model in models.values():
            model.to_empty(device=SIMULATED)
            model.train()
        ours.copy_weights(models)
        yield ours, models


def meta_models(method: Method) -> tuple[Method, dict[str, nn.Module]]:
    """The same on the meta device."""
    family = method.family
    ours = copy(method)
    # One of its own: what a family remembers of a step would be simulated too.
    ours.family = type(family)(family.folder, family.options, vae_tiling=family.vae_tiling)
    models = ours.build()
    for name, model in models.items():
        is_transformer = name.startswith("transformer")
        kept = (getattr(model, "_keep_in_fp32_modules", None) or ()) if is_transformer else ()
        cast_as_loaded(model, ours.weights_dtype if is_transformer else ours.dtype, kept=kept)
    with torch.device("meta"):
        ours.attach(models, seed=0)
    return ours, models


def one_expert(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The models that a pass asks: of two experts one, because which it is depends on numbers, which are not there."""
    return {name: model for name, model in models.items() if name != "transformer_2" or "transformer" not in models}


def blank_batch(method: Method, bucket: Bucket, condition: Condition, *, batch_size: int = 1) -> Batch:
    """Zeros in the shapes of a batch of one size, with these frames given."""
    family = method.family
    latents = torch.zeros(family.latent_channels, *family.latent_shape(bucket))
    given = family.given(condition, latents, family.blank_condition(bucket, condition), None)
    text = family.blank_text()
    if method.trains_text_encoder:
        tokens = family.tokenize(family.load_tokenizers(), [""])
        text = {name: tensor[0] for name, tensor in tokens.items()}
    return Batch(
        latents_BCFHW=_repeated({"": latents}, batch_size)[""],
        noise_BCFHW=_repeated({"": latents}, batch_size)[""],
        level_B=torch.full((batch_size,), 0.5),
        text=_repeated(text, batch_size),
        given=_repeated(given, batch_size),
        fps_B=torch.full((batch_size,), family.default_fps, dtype=torch.float64),
        names=("",) * batch_size,
        num_tokens=batch_size * family.num_tokens(bucket),
    )


def _repeated(tensors: Mapping[str, torch.Tensor], batch_size: int) -> dict[str, torch.Tensor]:
    return {name: torch.stack([tensor] * batch_size) for name, tensor in tensors.items()}
