"""The noisy input, the target and the laws of the noise level, against formulas worked out here."""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist, fmean

import pytest
import torch

from finetrainers.objectives import MIN_SIGMA, FlowMatching, build_objective

DRAWS = 8_000
TOLERANCE = 1.95 / DRAWS**0.5
"""Kolmogorov's distance between a law and that many draws of it stays below this in 999 of 1000 cases."""

Law = Callable[[float], float]


def draws(name: str, num_tokens: int = 1024, **options: float) -> list[float]:
    sample = sampler(name, **options)
    generator = torch.Generator().manual_seed(20240917)
    return [sample(num_tokens, generator) for _ in range(DRAWS)]


def sampler(name: str, **options: float) -> Callable[[int, torch.Generator], float]:
    given = {"logit_mean": 0.0, "logit_std": 1.0, "uniform_share": 0.1} | options
    return build_objective(name, **given).sample_sigma


def distance(drawn: list[float], law: Law) -> float:
    """Kolmogorov's: the largest difference between the share of draws up to a level and what the law says."""
    ranked = sorted(drawn)
    num = len(ranked)
    return max(max((i + 1) / num - law(x), law(x) - i / num) for i, x in enumerate(ranked) if x < 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def share_below(y: float, *, mean: float, std: float) -> float:
    """P(sigmoid(N(mean, std)) <= y)."""
    return 0.0 if y <= 0 else 1.0 if y >= 1 else NormalDist(mean, std).cdf(math.log(y / (1 - y)))


def shifted_law(mean: float, std: float, share: float) -> Law:
    """The law with the constants that Lightricks' trainer has: quantiles 0.5 % and 99.9 %, reflection at 1e-3."""
    low, high = sigmoid(mean - 2.5758 * std), sigmoid(mean + 3.0902 * std)

    def stretched_below(y: float) -> float:
        return share_below(low + y * (high - low), mean=mean, std=std)

    def law(x: float) -> float:
        return share * x + (1 - share) * (stretched_below(x) - stretched_below(0.002 - x))

    return law


NOISED = [(0.5, 2.0, -1.0), (0.001, 1.0, 3.0), (1.0, 7.0, 0.25), (0.12345, -2.5, 0.125), (0.9995, 1.0, 1.5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_input_timestep_and_target(dtype):
    """A batch with a level of its own for each sample; the values are exact in bf16, so all rounding is ours."""
    objective = FlowMatching(sample_sigma=lambda tokens, generator: 0.5)
    levels, clean, noises = (torch.tensor(column) for column in zip(*NOISED, strict=True))
    shape = (len(NOISED), 2, 3, 2, 2)
    latents = clean.to(dtype).view(-1, 1, 1, 1, 1).expand(shape)
    noise = noises.to(dtype).view(-1, 1, 1, 1, 1).expand(shape)
    noised = objective.noise(latents, noise, levels)
    assert {noised.input_BCFHW.dtype, noised.timestep_B.dtype, noised.target_BCFHW.dtype} == {torch.float32}
    assert noised.input_BCFHW.shape == noised.target_BCFHW.shape == shape
    for row, (sigma, x, n) in enumerate(NOISED):
        assert noised.input_BCFHW[row].flatten().tolist() == pytest.approx([(1 - sigma) * x + sigma * n] * 24, rel=1e-6)
        assert noised.timestep_B[row].item() == pytest.approx(1000 * sigma, rel=1e-6)
        assert noised.target_BCFHW[row].unique().tolist() == [n - x]


def test_a_small_noise_level_is_not_lost_to_bf16():
    objective = FlowMatching(sample_sigma=lambda tokens, generator: 0.5)
    latents = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    noised = objective.noise(latents, torch.zeros_like(latents), torch.tensor([0.001]))
    assert noised.input_BCFHW.item() == pytest.approx(0.999, abs=1e-6), "bf16 has nothing between 0.996 and 1"
    assert noised.timestep_B.item() == pytest.approx(1.0, abs=1e-6)


LAWS = {
    "uniform": ("uniform", {}, lambda x: x),
    "logit_normal": ("logit_normal", {}, lambda x: share_below(x, mean=0, std=1)),
    "logit_normal, moved": (
        "logit_normal",
        {"logit_mean": 0.8, "logit_std": 0.5},
        lambda x: share_below(x, mean=0.8, std=0.5),
    ),
}


@pytest.mark.parametrize("case", LAWS)
def test_laws_that_know_no_tokens(case):
    name, options, law = LAWS[case]
    drawn = draws(name, **options)
    assert distance(drawn, law) < TOLERANCE
    assert all(MIN_SIGMA <= sigma <= 1 for sigma in drawn)
    assert drawn[:50] == draws(name, num_tokens=9000, **options)[:50]


SHIFTED = {
    "below 1024 the line goes on": (256, {}, 0.95 - 768 * 1.1 / 3072),
    "at 1024": (1024, {}, 0.95),
    "halfway": (2560, {}, 1.5),
    "at 4096": (4096, {}, 2.05),
    "beyond 4096 it stays": (12000, {}, 2.05),
    "another spread and share": (2560, {"logit_std": 0.6, "uniform_share": 0.3}, 1.5),
    "no uniform share": (4096, {"uniform_share": 0.0}, 2.05),
    "nothing but uniform": (4096, {"uniform_share": 1.0}, 2.05),
}


@pytest.mark.parametrize("case", SHIFTED)
def test_the_shifted_law(case):
    num_tokens, options, mean = SHIFTED[case]
    drawn = draws("shifted_logit_normal", num_tokens, **options)
    law = shifted_law(mean, options.get("logit_std", 1.0), options.get("uniform_share", 0.1))
    assert distance(drawn, law) < TOLERANCE
    assert all(MIN_SIGMA <= sigma <= 1 for sigma in drawn)
    assert drawn[:50] == draws("shifted_logit_normal", num_tokens, **options)[:50], "the generator decides all"


def test_both_ends_of_the_shifted_law():
    """0.1 % of the stretched draws lie beyond 1 and stay there; 0.5 % fall below the least level and are reflected."""
    drawn = draws("shifted_logit_normal", 1024, uniform_share=0.0)
    at_one = sum(sigma == 1 for sigma in drawn)
    assert 0 < at_one < 0.001 * DRAWS + 4 * (0.001 * DRAWS) ** 0.5
    # The lowest 0.5 % of the normal reach down to -0.2, and with them the reflected draws up to 0.2.
    assert sum(sigma == MIN_SIGMA for sigma in drawn) == 0, "clamped to a heap rather than reflected"


def test_more_tokens_more_noise():
    sample = sampler("shifted_logit_normal")
    means = []
    for num_tokens in (256, 1024, 2560, 4096):
        generator = torch.Generator().manual_seed(1)
        means.append(fmean(sample(num_tokens, generator) for _ in range(1000)))
    # The median of the law moves from 0.61 at 256 tokens to 0.86 at 4096.
    assert all(more > less + 0.03 for less, more in pairwise(means)), means


@pytest.mark.parametrize("case", SHIFTED)
def test_one_draw_by_hand(case):
    """The law, step by step, for the numbers that a generator gives."""
    num_tokens, options, mean = SHIFTED[case]
    std, share = options.get("logit_std", 1.0), options.get("uniform_share", 0.1)
    low, high = sigmoid(mean - 2.5758 * std), sigmoid(mean + 3.0902 * std)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        coin, level = torch.rand(2, generator=generator).tolist()
        normal = torch.randn((), generator=generator).item()
        stretched = (sigmoid(mean + std * normal) - low) / (high - low)
        stretched = min(stretched, 1) if stretched >= 0.001 else 0.002 - stretched
        drawn = sampler("shifted_logit_normal", **options)(num_tokens, torch.Generator().manual_seed(seed))
        assert drawn == pytest.approx(max(level, 0.001) if coin < share else stretched, abs=2e-5), seed
