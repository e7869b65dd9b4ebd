"""Bytes that are counted without memory: by hand, and against real steps of tiny models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetrainers.commands.completing import DTYPES
from finetrainers.memory.simulation import LiveBytes, Peak, peak_bytes, saved_bytes, simulation
from finetrainers.training.measures import save_activations
from finetrainers.training.simulated import simulated_models
from tests.families.tiny import TINY
from tests.memory.training import FAMILIES, WORDS, load, make_method, random_batch, write_deeper

# Other than those of the tiny models, and no multiples of each other.
SIZES = {
    "ltx-0.9.0": {"num_layers": 3, "num_attention_heads": 6, "cross_attention_dim": 48},
    "cogvideox-5b": {"num_layers": 3, "num_attention_heads": 6},
    "hunyuan": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 3},
    "wan-2.1": {"num_layers": 3, "num_attention_heads": 6, "ffn_dim": 80},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {row: write_deeper(row, tmp_path_factory.mktemp("deeper") / row, **SIZES[row]) for row in FAMILIES}


def kept_by(method, models, batch) -> dict[str, tuple[int, Peak]]:
    """For each way to compute activations again what is saved, and what a step holds."""
    found = {}
    # What a family remembers of a size is made by the first step.
    method.loss(models, batch)

    def forward():
        return method.loss(models, batch)

    for word in WORDS:
        save_activations(method, models, checkpointing=word, offload=False)
        for model in models.values():
            model.zero_grad(set_to_none=True)
        found[word] = saved_bytes(forward, models.values()), peak_bytes(forward)
    return found


CASES = [
    pytest.param(row, name, precision, marks=[] if (name, precision) == ("lora", "bf16") else [pytest.mark.slow])
    for row in FAMILIES
    for name, precision in (("lora", "bf16"), ("full", "bf16"), ("full", "fp32"))
]


@pytest.mark.parametrize(("row", "name", "precision"), CASES)
def test_a_simulated_step_keeps_what_a_real_one_keeps(row, name, precision, folders):
    """Saved for the backward pass, alive after the forward pass and at the peak, left as gradients."""
    method = make_method(row, folders[row], name, dtype=DTYPES[precision])
    batch = random_batch(method, TINY[row].other_bucket, size=1)
    models = load(method, "none")
    # As the loop and the simulation do.
    method.copy_weights(models)
    real = kept_by(method, models, batch)
    with simulated_models(method) as (ours, fakes):
        simulated = kept_by(ours, fakes, batch)
    for word, (saved, peak) in real.items():
        # Means and deviations of layers this narrow weigh something, and simulated ones are of another type; a random
        # generator's state of 5 KB is seen only there.
        assert simulated[word][0] == pytest.approx(saved, rel=0.03), word
        made = simulated[word][1]
        assert made.after_forward == pytest.approx(peak.after_forward, rel=0.03, abs=6000), word
        assert made.peak == pytest.approx(peak.peak, rel=0.05), word
        assert made.after_backward == pytest.approx(peak.after_backward, rel=0.03), word


def test_saved_bytes_by_hand():
    """A linear layer saves its input, once though two layers share it, and its own weight is not counted; GELU saves
    its input."""
    first, second = nn.Linear(100, 50), nn.Linear(100, 50)
    given = torch.randn(7, 100)

    def forward():
        return nn.functional.gelu(first(given)) + second(given)

    assert saved_bytes(forward, (first, second)) == 4 * (7 * 100 + 7 * 50)


def test_peak_by_hand():
    """Of three numbers a tensor: what is let go of is not counted with what comes after it."""
    weight = torch.ones(1000, requires_grad=True)
    live = LiveBytes()
    with live.counted():
        kept = weight * 2
        kept.mul_(2)
        assert (live.now, live.peak) == (4000, 4000), "in place and a view are no new memory"
        view = kept.view(10, 100)
        let_go = torch.cat([kept, kept])
        assert (live.now, live.peak) == (12000, 12000)
        del let_go
        assert live.now == 4000
        del kept
        assert live.now == 4000, "the view keeps it"
        del view
        assert (live.now, live.peak) == (0, 12000)
    torch.zeros(10)
    assert live.now == 0, "nothing is counted afterwards"


def test_attention_is_that_of_a_flash_kernel():
    """Queries, keys, values, the answer and a number a row, not the square of the length."""
    shape = (1, 2, 4096, 64)
    with simulation():
        given = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        mask = torch.ones(1, 1, 1, 4096, dtype=torch.bool)
        peak = peak_bytes(lambda: nn.functional.scaled_dot_product_attention(*given, attn_mask=mask))
    answer, rows = 2 * 2 * 4096 * 64, 4 * 2 * 4096
    assert peak.after_forward == pytest.approx(answer + rows, rel=0.1)
    assert peak.peak < 6 * answer


def test_gradients_are_what_is_left():
    layer = nn.Linear(10, 20)
    peak = peak_bytes(lambda: layer(torch.randn(3, 10)).square())
    assert peak.after_backward == 4 * (10 * 20 + 20)
