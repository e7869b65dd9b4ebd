"""How rotary positions in time reach beyond the trained length: the maths of `model.rope_temporal`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Shape suffixes: B batch, C channels, F frames, H height, W width, S video tokens, D features of a position.

_RIFLEX_SHARE = 0.9
"""Part of a turn that RIFLEx leaves the slowed frequency over the whole video, so that it never comes back."""


def temporal_frequencies(dim: int, theta: float, *, trained: int, wanted: int, method: str) -> Tensor:
    """Angular frequencies of the time axis, per position, fastest first: fp64 [dim / 2], on the CPU.

    `trained` and `wanted` are lengths in latent frames: what the base model saw, and what is reached for. `ntk` raises
    the base so that the slowest frequency turns no further than before (https://arxiv.org/abs/2309.00071); `riflex`
    slows the first frequency whose period the base model saw no more than once (https://arxiv.org/abs/2502.15894).
    """
    if method == "ntk":
        theta *= max(wanted / trained, 1.0) ** (dim / (dim - 2))
    # On the CPU even where modules are built on the meta device: some read the numbers right away.
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if method == "riflex":
        # Not read from the tensor, which has no numbers where a step is simulated.
        periods = [2 * math.pi * theta ** (index / dim) for index in range(0, dim, 2)]
        intrinsic = next((k for k, period in enumerate(periods) if period >= trained), None)
        if intrinsic is not None and wanted > periods[intrinsic]:
            frequencies[intrinsic] = _RIFLEX_SHARE * 2 * math.pi / wanted
    return frequencies


def position_scale(*, trained: int, wanted: int, method: str) -> float:
    """What positions in time are multiplied by: less than 1 where `interpolate` squeezes a longer video into the
    trained length, else 1."""
    return trained / wanted if method == "interpolate" and wanted > trained else 1.0


class StretchedRope(torch.nn.Module):
    """Stands in for a transformer's own rotary positions, `rope`, and changes those of the time axis alone: the first
    features of its tables of cosines and sines [S, D], two by two."""

    def __init__(self, rope: Any, *, trained: int, wanted: int, method: str) -> None:
        super().__init__()
        self.rope = rope
        self.num_features = rope.rope_dim[0]
        lengths = {"trained": trained, "wanted": wanted}
        self.scale = position_scale(**lengths, method=method)
        # Plain numbers: a buffer would be cast together with the weights, and a tensor would have to be moved.
        frequencies = temporal_frequencies(self.num_features, rope.theta, **lengths, method=method)
        self.frequencies: list[float] = frequencies.tolist()

    def forward(self, hidden_states_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for latents of this shape."""
        cos_SD, sin_SD = self.rope(hidden_states_BCFHW)
        num_frames = hidden_states_BCFHW.shape[2]
        positions_F = torch.arange(num_frames, device=cos_SD.device, dtype=torch.float32) * self.scale
        angles_FD = torch.stack([positions_F * frequency for frequency in self.frequencies], dim=1)
        angles_SD = angles_FD.repeat_interleave(2, dim=1).repeat_interleave(len(cos_SD) // num_frames, dim=0)
        cos_SD = torch.cat([angles_SD.cos(), cos_SD[:, self.num_features :]], dim=1)
        sin_SD = torch.cat([angles_SD.sin(), sin_SD[:, self.num_features :]], dim=1)
        return cos_SD, sin_SD
