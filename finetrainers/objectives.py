"""What the transformer learns to predict: clean latents become a noisy input, a timestep, a target and a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import torch
from torch import Tensor

from finetrainers.errors import UserError

# Shape suffixes: B batch, C channels, F latent frames, H, W latent height and width.

MIN_SIGMA = 1e-3
"""No flow is cleaner than this: the last noise level of a thousand."""
_NORMAL = NormalDist()
_LOW, _HIGH = _NORMAL.inv_cdf(0.005), _NORMAL.inv_cdf(0.999)

Law = Callable[[int, float], float]
"""A law of noise levels: `law(num_tokens, u)` makes a level in [0, 1] of a uniform draw u in (0, 1). It is the law's
quantile, or piece by piece where it mixes two laws, so that spreading the draws of a step spreads its levels."""


@dataclass(frozen=True)
class Noised:
    """What one forward pass is given and what it should answer. All fp32."""

    input_BCFHW: Tensor
    timestep_B: Tensor
    """In [0, 1000]: not rounded under flow matching, whole numbers under v-prediction."""
    target_BCFHW: Tensor
    weight_B: Tensor | None
    """Factor of each sample's loss; None is 1."""


class Objective(Protocol):
    """How latents are noised, and at which levels."""

    @property
    def law(self) -> Law:
        """From which noise levels are drawn."""

    def noise(self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, level_B: Tensor) -> Noised:
        """Mix clean latents with noise at these levels, in fp32: bf16 would lose small noise levels altogether."""


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: the input is `(1 - sigma) * latents + sigma * noise`, the target is `noise - latents`; the noise
    level is sigma itself.

    Source: Liu et al. 2022 (arXiv 2209.03003), in the sign convention of diffusers' FlowMatchEulerDiscreteScheduler.
    """

    law: Law

    def noise(self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, level_B: Tensor) -> Noised:
        sigma_B = level_B.float().clamp(MIN_SIGMA, 1.0)
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        latents, noise = latents_BCFHW.float(), noise_BCFHW.float()
        return Noised((1 - sigma) * latents + sigma * noise, 1000.0 * sigma_B, noise - latents, None)


@dataclass(frozen=True)
class VPrediction:
    """Diffusion with v as the target: `alpha * noise - sigma * latents` for the input `alpha * latents + sigma *
    noise`, where alpha is the root of the signal kept and sigma of the rest. A noise level is a share of the timesteps.

    Source: Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
    """

    law: Law
    alphas_cumprod: Tensor
    """Signal kept at each timestep, fp64."""
    snr_gamma: float | None
    """Weight the loss by min(SNR, gamma) / (SNR + 1), which is min-SNR weighting for v. Source: Hang et al. 2023 (arXiv
    2303.09556), section 3.4."""

    def noise(self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, level_B: Tensor) -> Noised:
        num_timesteps = len(self.alphas_cumprod)
        timestep_B = (level_B.double() * num_timesteps).floor().clamp(0, num_timesteps - 1).long()
        kept_B = self.alphas_cumprod.to(timestep_B.device)[timestep_B]
        alpha, sigma = (root.float().view(-1, 1, 1, 1, 1) for root in (kept_B.sqrt(), (1 - kept_B).sqrt()))
        latents, noise = latents_BCFHW.float(), noise_BCFHW.float()
        weight_B = None
        if self.snr_gamma is not None:
            # SNR = kept / (1 - kept), so SNR + 1 = 1 / (1 - kept); written so that nothing is divided by zero.
            weight_B = torch.minimum(kept_B, self.snr_gamma * (1 - kept_B)).float()
        return Noised(alpha * latents + sigma * noise, timestep_B.float(), alpha * noise - sigma * latents, weight_B)


def uniform(num_tokens: int, u: float) -> float:
    """Every noise level alike."""
    return u


def logit_normal(mean: float, std: float) -> Law:
    """`sigmoid(N(mean, std))`: the middle noise levels most. Source: Esser et al. 2024 (arXiv 2403.03206), 3.1."""

    def law(num_tokens: int, u: float) -> float:
        return _sigmoid(mean + std * _NORMAL.inv_cdf(_inside(u)))

    return law


def mode(scale: float) -> Law:
    """Uniform at scale 0, more of the middle above. Source: Esser et al. 2024 (arXiv 2403.03206), 3.1, whose u is 1 - u
    here, so that more is more noise."""

    def law(num_tokens: int, u: float) -> float:
        return u - scale * (math.sin(math.pi * u / 2) ** 2 - u)

    return law


def shifted_logit_normal(std: float, uniform_share: float) -> Law:
    """LTX-Video's law: more tokens, more noise; stretched so that both ends are reached.

    `sigmoid(N(mu, std))` with mu linear in the tokens, 0.95 at 1024 and 2.05 from 4096 on; its 0.5 % and 99.9 %
    quantiles are stretched to 0 and 1, and what falls below `MIN_SIGMA` is reflected there. A share of the draws is
    uniform. Source: Lightricks' LTX-Video and LTX-2 trainers (`ShiftedLogitNormalTimestepSampler`).
    """

    def law(num_tokens: int, u: float) -> float:
        if u < uniform_share:
            return u / uniform_share
        normal = _NORMAL.inv_cdf(_inside((u - uniform_share) / (1 - uniform_share)))
        mu = min(0.95 + (num_tokens - 1024) * (2.05 - 0.95) / (4096 - 1024), 2.05)
        low, high, drawn = (_sigmoid(mu + std * value) for value in (_LOW, _HIGH, normal))
        stretched = (drawn - low) / (high - low)
        return min(stretched if stretched >= MIN_SIGMA else 2 * MIN_SIGMA - stretched, 1.0)

    return law


def shifted(law: Law, shift: float) -> Law:
    """Levels moved towards more noise, `shift * sigma / (1 + (shift - 1) * sigma)`, as diffusers' schedulers do."""

    def moved(num_tokens: int, u: float) -> float:
        level = law(num_tokens, u)
        return shift * level / (1 + (shift - 1) * level)

    return moved


def restricted(law: Law, low: float, high: float) -> Law:
    """The same law within a range of levels only, for an expert that is never asked about others."""
    # A law is monotone and without tokens here, so the range of u is found once, by bisection.
    first, last = (_inverse(law, level) for level in (low, high))

    def within(num_tokens: int, u: float) -> float:
        return min(max(law(num_tokens, _inside(first + (last - first) * u)), low), high)

    return within


def _inverse(law: Law, level: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if law(0, _inside(middle)) < level else (low, middle)
    return (low + high) / 2


def _inside(u: float) -> float:
    """A share that has a quantile under every law."""
    return min(max(u, 1e-9), 1 - 1e-9)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def build_law(options: Any, noise_range: tuple[float, float] = (0.0, 1.0)) -> Law:
    """The law that the options of `objective` describe. Raises UserError for one that has no part within the range."""
    name = options.timestep_sampling
    if name == "shifted_logit_normal":
        if noise_range != (0.0, 1.0):
            raise UserError(
                "objective.timestep_sampling shifted_logit_normal is LTX-Video's own and cannot be restricted to the "
                "noise levels of one expert; use logit_normal, mode or uniform"
            )
        return shifted(shifted_logit_normal(options.logit_std, options.uniform_share), options.shift)
    laws: dict[str, Law] = {
        "uniform": uniform,
        "logit_normal": logit_normal(options.logit_mean, options.logit_std),
        "mode": mode(options.mode_scale),
    }
    law = shifted(laws[name], options.shift)
    return law if noise_range == (0.0, 1.0) else restricted(law, *noise_range)


def build_objective(
    options: Any, *, alphas_cumprod: Tensor | None, noise_range: tuple[float, float]
) -> FlowMatching | VPrediction:
    """The objective of a family: v-prediction where it has discrete timesteps, else flow matching."""
    law = build_law(options, noise_range)
    weighted = options.loss_weighting == "min_snr"
    if alphas_cumprod is None:
        if weighted:
            raise UserError(
                "objective.loss_weighting min_snr is for models that predict v (CogVideoX); flow models weigh all "
                "noise levels alike"
            )
        return FlowMatching(law)
    return VPrediction(law, alphas_cumprod, options.snr_gamma if weighted else None)
