"""Where LTX-Video's latents lie in time and space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shape suffixes: B batch, S video tokens.


def seconds_between(stride: int, fps: Sequence[float], device: torch.device) -> float | Tensor:
    """Seconds between latents: a number where the batch agrees, as the pipeline passes it, else one a sample."""
    if len(set(fps)) == 1:
        return stride / fps[0]
    return torch.tensor([stride / rate for rate in fps], device=device).view(-1, 1, 1, 1, 1)


def causal_coordinates(
    ends: tuple[int, ...],
    height: int,
    width: int,
    strides: tuple[int, int],
    fps: tuple[float, ...],
    device: torch.device,
) -> Tensor:
    """Start of each latent in seconds and pixels, [B, 3, S]; `strides` are the frames and pixels that one stands for. A
    latent of n frames that ends at pixel frame e begins n - 1 frames before it, the first one at 0."""
    frames, space = strides
    axes = (
        (torch.tensor(ends, device=device) + 1 - frames).clamp(min=0),
        torch.arange(height, device=device) * space,
        torch.arange(width, device=device) * space,
    )
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).float()
    coordinates = grid.repeat(len(fps), 1, 1)
    coordinates[:, 0] *= torch.tensor([1.0 / rate for rate in fps], device=device)[:, None]
    return coordinates
