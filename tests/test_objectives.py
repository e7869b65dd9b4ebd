"""The noisy input, the target, its weight and the laws of the noise level, against formulas worked out here."""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist, fmean
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from finetrainers.config.schema import ObjectiveConfig
from finetrainers.errors import UserError
from finetrainers.objectives import MIN_SIGMA, FlowMatching, VPrediction, build_law, build_objective, uniform

NUM_LEVELS = 8_000
TOLERANCE = 2 / NUM_LEVELS
"""So close are the quantiles at evenly spread shares to their law: each share is a level, at each end of a piece of the
law one may be missing."""

Law = Callable[[float], float]


def law_of(name: str, noise_range: tuple[float, float] = (0.0, 1.0), **options: float) -> Callable[[int, float], float]:
    return build_law(ObjectiveConfig(timestep_sampling=name, **{"shift": 1.0, **options}), noise_range)


def levels(name: str, num_tokens: int = 1024, noise_range: tuple[float, float] = (0.0, 1.0), **options: float) -> Any:
    """The law's levels at evenly spread shares, in order of the shares."""
    law = law_of(name, noise_range, **options)
    return [law(num_tokens, (index + 0.5) / NUM_LEVELS) for index in range(NUM_LEVELS)]


def distance(found: list[float], law: Law) -> float:
    """Kolmogorov's: the largest difference between the share of levels up to one and what the law says."""
    ranked = sorted(found)
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


def mode_of_esser(u: float, scale: float) -> float:
    """Esser et al. 2024, section 3.1, as printed; its u = 0 is pure noise."""
    return 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)


NOISED = [(0.5, 2.0, -1.0), (0.001, 1.0, 3.0), (1.0, 7.0, 0.25), (0.12345, -2.5, 0.125), (0.9995, 1.0, 1.5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_input_timestep_and_target_of_a_flow(dtype):
    """A batch with a level of its own for each sample; the values are exact in bf16, so all rounding is ours."""
    level_B, clean, noises = (torch.tensor(column) for column in zip(*NOISED, strict=True))
    shape = (len(NOISED), 2, 3, 2, 2)
    latents = clean.to(dtype).view(-1, 1, 1, 1, 1).expand(shape)
    noise = noises.to(dtype).view(-1, 1, 1, 1, 1).expand(shape)
    noised = FlowMatching(uniform).noise(latents, noise, level_B)
    assert {noised.input_BCFHW.dtype, noised.timestep_B.dtype, noised.target_BCFHW.dtype} == {torch.float32}
    assert noised.input_BCFHW.shape == noised.target_BCFHW.shape == shape
    assert noised.weight_B is None
    for row, (sigma, x, n) in enumerate(NOISED):
        assert noised.input_BCFHW[row].flatten().tolist() == pytest.approx([(1 - sigma) * x + sigma * n] * 24, rel=1e-6)
        assert noised.timestep_B[row].item() == pytest.approx(1000 * sigma, rel=1e-6)
        assert noised.target_BCFHW[row].unique().tolist() == [n - x]


def test_a_small_noise_level_is_not_lost_to_bf16():
    latents = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    noised = FlowMatching(uniform).noise(latents, torch.zeros_like(latents), torch.tensor([0.001]))
    assert noised.input_BCFHW.item() == pytest.approx(0.999, abs=1e-6), "bf16 has nothing between 0.996 and 1"
    assert noised.timestep_B.item() == pytest.approx(1.0, abs=1e-6)


def test_no_flow_is_cleaner_than_the_last_of_a_thousand_levels():
    """Timestep, input and target all belong to the level that is used in place of a smaller one."""
    latents, noise = torch.full((2, 1, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1, 1), -1.0)
    noised = FlowMatching(uniform).noise(latents, noise, torch.tensor([0.0, MIN_SIGMA / 2]))
    assert noised.timestep_B.tolist() == pytest.approx([1000 * MIN_SIGMA] * 2)
    assert noised.input_BCFHW.flatten().tolist() == pytest.approx([3 - 4 * MIN_SIGMA] * 2)


LAWS: dict[str, tuple[str, dict[str, float], Law]] = {
    "uniform": ("uniform", {}, lambda x: x),
    "logit_normal": ("logit_normal", {}, lambda x: share_below(x, mean=0, std=1)),
    "logit_normal, moved": (
        "logit_normal",
        {"logit_mean": 0.8, "logit_std": 0.5},
        lambda x: share_below(x, mean=0.8, std=0.5),
    ),
    # A shift s is s x / (1 + (s - 1) x), so a level below y was one below y / (s - (s - 1) y) before.
    "uniform, shifted": ("uniform", {"shift": 7.0}, lambda y: y / (7 - 6 * y)),
    "uniform, shifted down": ("uniform", {"shift": 0.25}, lambda y: y / (0.25 + 0.75 * y)),
    "logit_normal, shifted": (
        "logit_normal",
        {"logit_mean": -0.4, "shift": 3.0},
        lambda y: share_below(y / (3 - 2 * y), mean=-0.4, std=1),
    ),
    # The shift of a logit-normal is another logit-normal: it adds log(s) to the mean.
    "logit_normal, shifted, by its mean": (
        "logit_normal",
        {"shift": 5.0},
        lambda x: share_below(x, mean=math.log(5), std=1),
    ),
    "mode of scale 0 is uniform": ("mode", {"mode_scale": 0.0}, lambda x: x),
}


@pytest.mark.parametrize("case", LAWS)
def test_laws_that_know_no_tokens(case):
    name, options, law = LAWS[case]
    found = levels(name, **options)
    assert distance(found, law) < TOLERANCE
    assert all(less < more for less, more in pairwise(found)), "the larger the share, the more noise"
    assert min(found) >= 0 and max(found) <= 1
    assert found == levels(name, num_tokens=9000, **options)
    least, most = (law_of(name, **options)(1024, u) for u in (0.0, 1.0))
    assert 0 <= least < found[0] and found[-1] < most <= 1, "the ends have levels too"


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 0.8, 1.29, 1.75])
def test_the_mode_law_is_the_one_of_the_paper(scale):
    law = law_of("mode", mode_scale=scale)
    shares = [index / 500 for index in range(501)]
    for u in shares:
        assert law(0, 1 - u) == pytest.approx(mode_of_esser(u, scale), abs=1e-12)
    assert all(law(0, less) < law(0, more) for less, more in pairwise(shares)), "at every scale that the schema admits"
    middle = sum(0.25 < law(0, (index + 0.5) / 1000) < 0.75 for index in range(1000)) / 1000
    assert (middle > 0.5) == (scale > 0) and (middle < 0.5) == (scale < 0)


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "mode", "shifted_logit_normal"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
def test_a_shift_is_applied_once_to_every_law(name, shift):
    for num_tokens in (256, 4096):
        plain, moved = levels(name, num_tokens), levels(name, num_tokens, shift=shift)
        assert moved == pytest.approx([shift * x / (1 + (shift - 1) * x) for x in plain], abs=1e-12)


RANGES = [(0.875, 1.0), (0.0, 0.875), (0.3, 0.4)]


@pytest.mark.parametrize("noise_range", RANGES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("uniform", {}), ("uniform", {"shift": 5.0}), ("logit_normal", {"shift": 3.0}), ("mode", {"mode_scale": 1.0})],
)
def test_a_restricted_law_keeps_its_shape(name, options, noise_range):
    """The levels that rejection sampling would leave of the whole law, in the same order."""
    low, high = noise_range
    within, whole = levels(name, noise_range=noise_range, **options), law_of(name, **options)
    many = (whole(0, (index + 0.5) / 80_000) for index in range(80_000))
    kept = [level for level in many if low <= level <= high]
    assert len(kept) > 1000 and low <= min(within) and max(within) <= high
    assert all(less <= more for less, more in pairwise(within))
    resolution = max(more - less for less, more in pairwise(kept))
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        ours, theirs = (ranked[int(share * len(ranked))] for ranked in (within, kept))
        assert ours == pytest.approx(theirs, abs=2 * resolution + 2 * (high - low) / NUM_LEVELS / min(share, 1 - share))
    assert fmean(within) == pytest.approx(fmean(kept), abs=(high - low) * 1e-3)


def test_the_law_with_tokens_cannot_be_restricted():
    with pytest.raises(UserError, match=r"shifted_logit_normal.*cannot be restricted") as refused:
        law_of("shifted_logit_normal", (0.875, 1.0))
    assert len(str(refused.value).splitlines()) == 1


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
    found = levels("shifted_logit_normal", num_tokens, **options)
    law = shifted_law(mean, options.get("logit_std", 1.0), options.get("uniform_share", 0.1))
    # Three pieces: the uniform share, what is reflected, and the rest.
    assert distance(found, law) < 3 * TOLERANCE
    assert min(found) >= 0 and max(found) <= 1


@pytest.mark.parametrize("case", SHIFTED)
def test_levels_of_the_shifted_law_by_hand(case):
    """Step by step: a share of the uniform draws as they are, the rest through the normal, stretched and reflected."""
    num_tokens, options, mean = SHIFTED[case]
    std, share = options.get("logit_std", 1.0), options.get("uniform_share", 0.1)
    low, high = sigmoid(mean - 2.5758 * std), sigmoid(mean + 3.0902 * std)
    law = law_of("shifted_logit_normal", **options)
    for index in range(200):
        u = (index + 0.5) / 200
        if u < share:
            expected = u / share
        else:
            normal = NormalDist().inv_cdf((u - share) / (1 - share))
            stretched = (sigmoid(mean + std * normal) - low) / (high - low)
            expected = min(stretched, 1) if stretched >= 0.001 else 0.002 - stretched
        assert law(num_tokens, u) == pytest.approx(expected, abs=2e-5), u


def test_both_ends_of_the_shifted_law():
    """0.1 % of the stretched levels lie beyond 1 and stay there; 0.5 % fall below the least level and are reflected."""
    found = levels("shifted_logit_normal", 1024, uniform_share=0.0)
    assert sum(level == 1 for level in found) == 0.001 * NUM_LEVELS
    assert sum(level <= MIN_SIGMA for level in found) == 0, "clamped to a heap rather than reflected"
    falling = [more < less for less, more in pairwise(found)]
    # Up to the one pair at which the reflection turns back.
    assert abs(sum(falling) - 0.005 * NUM_LEVELS) <= 1 and falling == sorted(falling, reverse=True)


def test_more_tokens_more_noise():
    means = [fmean(levels("shifted_logit_normal", num_tokens)) for num_tokens in (256, 1024, 2560, 4096)]
    # The median of the law moves from 0.61 at 256 tokens to 0.86 at 4096.
    assert all(more > less + 0.03 for less, more in pairwise(means)), means


def scheduler(snr_shift_scale: float) -> CogVideoXDDIMScheduler:
    """As CogVideoX is published."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
    )


def v_prediction(snr_shift_scale: float, **options: Any) -> VPrediction:
    settings = ObjectiveConfig(timestep_sampling="uniform", shift=1.0, **options)
    alphas_cumprod = scheduler(snr_shift_scale).alphas_cumprod
    built = build_objective(settings, alphas_cumprod=alphas_cumprod, noise_range=(0.0, 1.0))
    assert isinstance(built, VPrediction)
    return built


SIGNAL_KEPT = {
    3.0: {0: 0.99745, 100: 0.728, 250: 0.389, 500: 0.0953, 750: 0.0108, 900: 0.00095, 999: 0.0},
    1.0: {0: 0.99915, 100: 0.887, 250: 0.652, 500: 0.241, 750: 0.0328, 900: 0.00296, 999: 0.0},
}


@pytest.mark.parametrize("snr_shift_scale", SIGNAL_KEPT)
def test_the_signal_that_is_kept(snr_shift_scale):
    """From the betas by hand: cumulated, shifted, brought to nothing at the last timestep; and some known values."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    kept = kept / (snr_shift_scale + (1 - snr_shift_scale) * kept)
    root = kept.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(v_prediction(snr_shift_scale).alphas_cumprod, root**2, rtol=1e-6, atol=1e-9)
    for timestep, expected in SIGNAL_KEPT[snr_shift_scale].items():
        assert root[timestep].item() ** 2 == pytest.approx(expected, rel=5e-3, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("snr_shift_scale", SIGNAL_KEPT)
def test_input_and_target_of_v_prediction_are_the_schedulers(snr_shift_scale, dtype):
    theirs, timesteps = scheduler(snr_shift_scale), torch.tensor([0, 1, 10, 400, 998, 999])
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(6, 2, 3, 2, 2, generator=generator).to(dtype) for _ in range(2))
    noised = v_prediction(snr_shift_scale).noise(latents, noise, (timesteps + 0.5) / 1000)
    assert {noised.input_BCFHW.dtype, noised.timestep_B.dtype, noised.target_BCFHW.dtype} == {torch.float32}
    assert noised.timestep_B.tolist() == timesteps.tolist() and noised.weight_B is None
    clean, noise = latents.float(), noise.float()
    torch.testing.assert_close(noised.input_BCFHW, theirs.add_noise(clean, noise, timesteps), rtol=0, atol=1e-5)
    torch.testing.assert_close(noised.target_BCFHW, theirs.get_velocity(clean, noise, timesteps), rtol=0, atol=1e-5)
    # The scheduler's own way back, whose arguments stand for the answer and the input here.
    back = theirs.get_velocity(noised.target_BCFHW, noised.input_BCFHW, timesteps)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)
    assert not torch.allclose(noised.input_BCFHW[0], clean[0], atol=1e-3), "fp32 keeps the noise of the first timestep"


def test_every_timestep_is_reached_once():
    """Also by levels that the law draws in parts of a thousand, at both ends of each part."""
    objective = v_prediction(1.0)
    latents = torch.zeros(1000, 1, 1, 1, 1)
    for within in (0.01, 0.5, 0.99):
        drawn = torch.tensor([objective.law(1, (index + within) / 1000) for index in range(1000)])
        assert objective.noise(latents, latents, drawn).timestep_B.tolist() == list(range(1000))
    ends = objective.noise(latents[:2], latents[:2], torch.tensor([0.0, 1.0]))
    assert ends.timestep_B.tolist() == [0, 999]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("snr_shift_scale", SIGNAL_KEPT)
def test_the_weight_is_min_snr(snr_shift_scale, gamma):
    """min(SNR, gamma) / (SNR + 1) at every timestep; at the last there is no signal, and no infinity either."""
    objective = v_prediction(snr_shift_scale, loss_weighting="min_snr", snr_gamma=gamma)
    latents = torch.zeros(1000, 1, 1, 1, 1)
    weight_B = objective.noise(latents, latents, (torch.arange(1000) + 0.5) / 1000).weight_B
    assert weight_B.dtype == torch.float32 and weight_B.isfinite().all()
    for timestep, kept in enumerate(objective.alphas_cumprod.tolist()):
        snr = kept / (1 - kept)
        assert weight_B[timestep].item() == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-6, abs=1e-12)
    assert weight_B[999] == 0 and weight_B.argmax() not in (0, 999), "neither end weighs most"


def test_flows_are_not_weighted():
    options = ObjectiveConfig(timestep_sampling="uniform", shift=1.0, loss_weighting="min_snr")
    with pytest.raises(UserError, match="min_snr is for models that predict v"):
        build_objective(options, alphas_cumprod=None, noise_range=(0.0, 1.0))
    plain = ObjectiveConfig(timestep_sampling="uniform", shift=1.0)
    assert isinstance(build_objective(plain, alphas_cumprod=None, noise_range=(0.0, 1.0)), FlowMatching)
