"""What is refused of linear layers that compute in float8, and what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from finetrainers.engines.base import Engine
from finetrainers.errors import UserError
from finetrainers.methods.base import Method

logger = logging.getLogger(__name__)

_OLDEST = {"tensorwise": (8, 9), "rowwise": (9, 0)}
"""Compute capability of a GPU with such products."""


def check_float8(method: Method, engine: Engine) -> None:
    """Raise UserError where `method.float8_recipe` cannot be had on this device, by these processes or of this model,
    from its config alone."""
    if (recipe := method.float8_recipe) is None:
        return
    key = f"method.float8_recipe {recipe}"
    if engine.device.type == "cuda" and (found := torch.cuda.get_device_capability(engine.device)) < _OLDEST[recipe]:
        others = [other for other, oldest in _OLDEST.items() if found >= oldest]
        mend = f"take {' or '.join(others)}, or leave it out" if others else "leave it out"
        needed, there = (".".join(map(str, version)) for version in (_OLDEST[recipe], found))
        raise UserError(f"{key} needs a GPU of compute capability {needed} and up, and this one has {there}: {mend}")
    if engine.context_size > 1:
        raise UserError(
            f"{key} would scale each process's part of the tokens by itself, with other numbers than those of one "
            "process: leave it out, or set parallel.context_parallel_size 1"
        )
    with torch.device("meta"):
        method.attach(method.build(), seed=0)


def tell_float8(method: Method, blocks: Iterable[nn.Module]) -> None:
    """Say which layers of the transformers' blocks compute in float8, where any do."""
    if method.float8_recipe is not None:
        from finetrainers.float8 import describe

        logger.info("%s", describe(blocks, method.float8_recipe))
