"""What the transformer learns to predict: clean latents become a noisy input, a timestep and a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

# Shape suffixes: B batch, C channels, F latent frames, H, W latent height and width.

MIN_SIGMA = 1e-3
"""No draw is cleaner than this: the last noise level of a thousand."""
_LOW = NormalDist().inv_cdf(0.005)
_HIGH = NormalDist().inv_cdf(0.999)


@dataclass(frozen=True)
class Noised:
    """What one forward pass is given and what it should answer. All fp32."""

    input_BCFHW: Tensor
    timestep_B: Tensor
    """In [0, 1000], not rounded."""
    target_BCFHW: Tensor


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: the input is `(1 - sigma) * latents + sigma * noise`, the target is `noise - latents`.

    Source: Liu et al. 2022 (arXiv 2209.03003), in the sign convention of diffusers' FlowMatchEulerDiscreteScheduler.
    `sample_sigma(num_tokens, generator)` draws one noise level.
    """

    sample_sigma: Callable[[int, torch.Generator], float]

    def noise(self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor) -> Noised:
        """Mix clean latents with noise at level sigma, in fp32: bf16 would lose small noise levels altogether."""
        sigma = sigma_B.float().view(-1, 1, 1, 1, 1)
        latents, noise = latents_BCFHW.float(), noise_BCFHW.float()
        return Noised((1 - sigma) * latents + sigma * noise, 1000.0 * sigma_B.float(), noise - latents)


def uniform(num_tokens: int, generator: torch.Generator) -> float:
    """Every noise level alike."""
    return max(MIN_SIGMA, torch.rand((), generator=generator).item())


def logit_normal(mean: float, std: float) -> Callable[[int, torch.Generator], float]:
    """`sigmoid(N(mean, std))`: the middle noise levels most. Source: Esser et al. 2024 (arXiv 2403.03206), 3.1."""

    def sample(num_tokens: int, generator: torch.Generator) -> float:
        return _clamped(_sigmoid(mean + std * torch.randn((), generator=generator).item()))

    return sample


def shifted_logit_normal(std: float, uniform_share: float) -> Callable[[int, torch.Generator], float]:
    """LTX-Video's law: more tokens, more noise; stretched so that both ends are reached.

    `sigmoid(N(mu, std))` with mu linear in the tokens, 0.95 at 1024 and 2.05 from 4096 on; its 0.5 % and 99.9 %
    quantiles are stretched to 0 and 1, and what falls below `MIN_SIGMA` is reflected there. A share of the draws is
    uniform. Source: Lightricks' LTX-Video and LTX-2 trainers (`ShiftedLogitNormalTimestepSampler`).
    """

    def sample(num_tokens: int, generator: torch.Generator) -> float:
        coin, level = torch.rand(2, generator=generator).tolist()
        normal = torch.randn((), generator=generator).item()
        if coin < uniform_share:
            return _clamped(level)
        mu = min(0.95 + (num_tokens - 1024) * (2.05 - 0.95) / (4096 - 1024), 2.05)
        low, high, drawn = (_sigmoid(mu + std * value) for value in (_LOW, _HIGH, normal))
        stretched = (drawn - low) / (high - low)
        return _clamped(stretched if stretched >= MIN_SIGMA else 2 * MIN_SIGMA - stretched)

    return sample


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _clamped(sigma: float) -> float:
    return min(max(sigma, MIN_SIGMA), 1.0)


def build_objective(
    timestep_sampling: str, *, logit_mean: float, logit_std: float, uniform_share: float
) -> FlowMatching:
    """The objective that the options describe."""
    laws: dict[str, Callable[[int, torch.Generator], float]] = {
        "uniform": uniform,
        "logit_normal": logit_normal(logit_mean, logit_std),
        "shifted_logit_normal": shifted_logit_normal(logit_std, uniform_share),
    }
    return FlowMatching(sample_sigma=laws[timestep_sampling])
