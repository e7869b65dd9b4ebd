"""Rounding at random keeps the mean, loses no small update, and leaves alone what it must."""

import pytest
import torch

from finetrainers.optimizers import by_tensor
from finetrainers.optimizers.rounding import round_stochastically
from finetrainers.training.callback import Callback
from tests.families.tiny import TINY
from tests.training.tiny_run import full, make_batch, make_trainer


def rounded(values, *, seed=0):
    return round_stochastically(values, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -7.3e8, 1 + 2**-9, 1e-40])
def test_the_mean_is_the_number_itself(value):
    count = 200_000
    values = torch.full((count,), value)
    drawn = rounded(values).double()
    low, high = drawn.min().item(), drawn.max().item()
    step = high - low
    assert low <= values[0].item() <= high and step > 0
    assert drawn.unique().numel() == 2, "its two neighbours and no other"
    # Of a draw between two neighbours the standard deviation is at most half of what lies between.
    assert abs(drawn.mean().item() - values[0].item()) < 5 * (step / 2) / count**0.5


def test_numbers_of_bf16_and_what_is_not_finite_stay():
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(10_000, generator=generator).bfloat16()
    assert torch.equal(rounded(kept.float()), kept)
    infinite = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(rounded(infinite).float(), infinite)
    # The bits of the NaN that GPUs make are the largest there are.
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).repeat(1000)
    assert rounded(bits.view(torch.float32)).isnan().all()


def test_a_seed_fixes_the_draw():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(values, seed=1), rounded(values, seed=1))
    assert not torch.equal(rounded(values, seed=1), rounded(values, seed=2))


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_step_end(self, trainer, outcome):
        self.values.append(outcome.loss.item())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))


def fall(model, *, weights_dtype, steps=150):
    """How far the loss on the same clips falls, at a learning rate whose updates are mostly less than half of what lies
    between two numbers of bf16."""
    losses = Losses()
    options = full(weights_dtype=weights_dtype)
    batches = [make_batch([0, 1, 2, 3])]
    trainer = make_trainer(
        model, batches, options=options, dtype=torch.bfloat16, lr=1e-4, steps=steps, callbacks=[losses]
    )
    trainer.fit()
    return losses.values[0], sum(losses.values[-10:]) / 10


def test_small_updates_are_kept_in_the_mean_and_nearest_rounding_loses_them(model, monkeypatch):
    before, after = fall(model, weights_dtype="fp32")
    _, ours = fall(model, weights_dtype="bf16")
    monkeypatch.setattr(by_tensor, "round_stochastically", lambda tensor, _: tensor.bfloat16())
    _, nearest = fall(model, weights_dtype="bf16")
    print(before, after, ours, nearest)
    assert after < 0.9 * before
    assert ours == pytest.approx(after, rel=0.02)
    assert before - nearest < 0.6 * (before - after)
