"""Where LTX-Video's latents lie in time and space."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape suffixes: B batch, S video tokens.


def seconds_between(stride: int, fps_B: Tensor) -> Tensor:
    """Seconds between latents of each sample, [B, 1, 1, 1, 1], fp32 as the pipeline's number becomes."""
    return (stride / fps_B).float().view(-1, 1, 1, 1, 1)


def causal_grid(
    ends: tuple[int, ...], height: int, width: int, strides: tuple[int, int], device: torch.device
) -> Tensor:
    """Start of each latent in frames and pixels, [3, S]; `strides` are the frames and pixels that one stands for. A
    latent of n frames that ends at pixel frame e begins n - 1 frames before it, the first one at 0."""
    frames, space = strides
    axes = (
        (torch.tensor(ends, device=device) + 1 - frames).clamp(min=0),
        torch.arange(height, device=device) * space,
        torch.arange(width, device=device) * space,
    )
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).float()


def in_seconds(grid_3S: Tensor, fps_B: Tensor) -> Tensor:
    """The same in seconds and pixels of each sample, [B, 3, S]."""
    coordinates_B3S = grid_3S.repeat(len(fps_B), 1, 1)
    coordinates_B3S[:, 0] *= (1.0 / fps_B).float()[:, None]
    return coordinates_B3S
