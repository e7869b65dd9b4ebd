"""The frequencies of the time axis, against the published figures and by hand."""

import math

import pytest
import torch

from finetrainers.families.rope import position_scale, temporal_frequencies

# dim, theta, trained latents: (frames - 1) / 4 + 1 of 129, 49 and 81.
HUNYUAN, COGVIDEOX, WAN = (16, 256.0, 33), (16, 1e4, 13), (44, 1e4, 21)


def frequencies(model: tuple[int, float, int], wanted: int, method: str) -> torch.Tensor:
    dim, theta, trained = model
    return temporal_frequencies(dim, theta, trained=trained, wanted=wanted, method=method)


def plain(dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * k / dim) for k in range(dim // 2)]


@pytest.mark.parametrize("model", [HUNYUAN, COGVIDEOX, WAN])
@pytest.mark.parametrize("method", ["interpolate", "ntk", "riflex"])
def test_within_the_trained_length_nothing_changes(model, method):
    dim, theta, trained = model
    for wanted in (trained, trained - 1, 1):
        assert frequencies(model, wanted, method).tolist() == pytest.approx(plain(dim, theta), rel=1e-12)
        assert position_scale(trained=trained, wanted=wanted, method=method) == 1.0


def test_interpolation_moves_positions_and_no_frequency():
    assert frequencies(HUNYUAN, 66, "interpolate").tolist() == pytest.approx(plain(16, 256.0), rel=1e-12)
    assert position_scale(trained=33, wanted=66, method="interpolate") == 0.5
    assert position_scale(trained=33, wanted=66, method="ntk") == 1.0
    assert position_scale(trained=33, wanted=66, method="riflex") == 1.0


@pytest.mark.parametrize("model", [HUNYUAN, COGVIDEOX, WAN])
def test_ntk_keeps_the_fastest_and_stretches_the_slowest_by_the_whole_factor(model):
    dim, theta, trained = model
    stretched = frequencies(model, 3 * trained, "ntk").tolist()
    assert stretched[0] == 1.0
    # b'^(-(d-2)/d) = b^(-(d-2)/d) / s, from b' = b * s^(d/(d-2)).
    assert stretched[-1] == pytest.approx(plain(dim, theta)[-1] / 3, rel=1e-12)
    base = theta * 3 ** (dim / (dim - 2))
    assert stretched == pytest.approx(plain(dim, base), rel=1e-12)


# The published choices (RIFLEx, table of its repository): the fourth of HunyuanVideo, the second of CogVideoX.
@pytest.mark.parametrize(("model", "index", "wanted"), [(HUNYUAN, 3, 66), (COGVIDEOX, 1, 25), (WAN, 3, 41)])
def test_riflex_slows_the_one_published_frequency(model, index, wanted):
    dim, theta, _ = model
    expected = plain(dim, theta)
    expected[index] = 0.9 * 2 * math.pi / wanted
    changed = frequencies(model, wanted, "riflex")
    assert changed.tolist() == pytest.approx(expected, rel=1e-12)
    assert 2 * math.pi / changed[index] > wanted, "the slowed frequency must not come round within the video"


@pytest.mark.parametrize(("wanted", "changes"), [(50, False), (51, True)])
def test_riflex_leaves_videos_alone_that_do_not_reach_the_period(wanted, changes):
    # The fourth period of HunyuanVideo is 2 * pi * 256^(6/16) = 50.27 latent frames.
    moved = frequencies(HUNYUAN, wanted, "riflex").tolist() != frequencies(HUNYUAN, wanted, "interpolate").tolist()
    assert moved == changes


def test_riflex_leaves_a_model_alone_whose_every_period_was_seen_to_repeat():
    assert temporal_frequencies(4, 2.0, trained=33, wanted=66, method="riflex").tolist() == pytest.approx(plain(4, 2.0))


def test_frequencies_are_fp64_numbers_even_where_networks_are_built_without_memory():
    with torch.device("meta"):
        values = frequencies(WAN, 41, "riflex")
    assert values.device.type == "cpu" and values.dtype == torch.float64 and values.shape == (22,)
