"""The posterior of a clip's latents, as a family encodes it, and draws from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def draw_latents(moments: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
    """Normalised latents [C, F, H, W], fp32: a draw from the posterior, or its mean without a generator.

    `moments` holds `mean` and `logvar` [C, F, H, W], and `shift` and `scale` [C] by which a draw is normalised.
    """
    import torch

    latents = moments["mean"].float()
    if generator is not None:
        deviation = torch.exp(0.5 * moments["logvar"].float())
        latents = latents + deviation * torch.randn(latents.shape, generator=generator)
    return (latents - moments["shift"].view(-1, 1, 1, 1)) * moments["scale"].view(-1, 1, 1, 1)
