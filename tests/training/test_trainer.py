"""The loop: accumulation, clipping, what a step reports, and that it learns."""

from dataclasses import replace

import pytest
import torch

from finetrainers.training.callback import Callback
from tests.families.tiny import TINY
from tests.training.tiny_run import full, lora, make_batch, make_trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))


class Recorder(Callback):
    def __init__(self):
        self.moments, self.outcomes = [], []

    def on_start(self, trainer):
        self.moments.append("start")

    def on_step_end(self, trainer, outcome):
        self.moments.append(outcome.step)
        self.outcomes.append(outcome)

    def on_end(self, trainer):
        self.moments.append("end")

    def close(self):
        self.moments.append("close")


def gradients_of_one_step(model, batches, *, options):
    """Gradients of the first step, caught before the optimizer drops them, and what the step said."""
    trainer = make_trainer(model, batches, options=options, gradient_accumulation_steps=len(batches), max_grad_norm=0.0)
    with torch.no_grad():
        for name, parameter in trainer.trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    seen = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: parameter.grad.clone() for name, parameter in trainer.trained.items()})
    )
    return seen, trainer.step(trainer.batches.start(0))


SPLITS = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]], [[0], [1, 2, 3]]]


@pytest.mark.parametrize("options", [lora(), full()], ids=["lora", "full"])
@pytest.mark.parametrize("split", SPLITS, ids=["1+1+1+1", "2+2", "3+1", "1+3"])
def test_accumulated_gradients_are_those_of_the_whole_batch(model, options, split):
    whole, expected = gradients_of_one_step(model, [make_batch([0, 1, 2, 3])], options=options)
    parts, outcome = gradients_of_one_step(model, [make_batch(part) for part in split], options=options)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    torch.testing.assert_close(outcome.loss, expected.loss)
    torch.testing.assert_close(outcome.grad_norm, expected.grad_norm)
    assert (outcome.num_samples, outcome.num_tokens) == (4, 48)


def test_the_loss_is_the_mean_over_the_samples(model):
    batch = make_batch([0, 1, 2])
    trainer = make_trainer(model, [batch])
    with torch.no_grad():
        one_by_one = [trainer.loss(make_batch([index])).item() for index in range(3)]
    outcome = trainer.step(trainer.batches.start(0))
    assert outcome.loss.item() == pytest.approx(sum(one_by_one) / 3, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e6])
def test_clipping_and_the_norm_that_is_reported(model, max_norm):
    trainer = make_trainer(model, [make_batch([0, 1])], options=full(), max_grad_norm=max_norm)
    applied = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: applied.append(torch.stack([p.grad.norm() for p in trainer.trained.values()]).norm())
    )
    outcome = trainer.step(trainer.batches.start(0))
    expected = min(outcome.grad_norm.item(), max_norm) if max_norm else outcome.grad_norm.item()
    assert outcome.grad_norm > 0.1
    assert applied[0].item() == pytest.approx(expected, rel=1e-3)


def test_moments_come_in_order_and_close_comes_always(model):
    recorder = Recorder()
    trainer = make_trainer(model, [make_batch([0]), make_batch([1])], callbacks=[recorder], steps=3)
    trainer.fit()
    assert recorder.moments == ["start", 1, 2, 3, "end", "close"]
    assert [outcome.epoch for outcome in recorder.outcomes] == [0, 0, 1]
    assert (trainer.state.step, trainer.state.batches, trainer.state.samples) == (3, 3, 3)
    recorder = Recorder()
    trainer = make_trainer(model, [replace(make_batch([0]), text={})], callbacks=[recorder])
    with pytest.raises(KeyError):
        trainer.fit()
    assert recorder.moments == ["start", "close"]


def test_a_request_to_stop_ends_after_the_step(model):
    recorder = Recorder()
    trainer = make_trainer(model, [make_batch([0])], callbacks=[recorder], steps=9)
    trainer.stop_requested = lambda: trainer.state.step >= 2
    trainer.fit()
    assert recorder.moments == ["start", 1, 2, "end", "close"]
    assert trainer.stopping


def test_it_learns_one_clip(model):
    """Full fine-tuning on one clip: the loss at fixed noise and noise levels falls by at least half."""
    batches = [make_batch([0, 0, 0, 0], epoch=epoch) for epoch in range(40)]
    batches = [replace(batch, noise_BCFHW=make_batch([4 * n + i for i in range(4)], epoch=n).noise_BCFHW,
                       level_B=make_batch([4 * n + i for i in range(4)], epoch=n).level_B)
               for n, batch in enumerate(batches)]  # fmt: skip
    trainer = make_trainer(model, batches, options=full(), lr=3e-3, steps=500)
    fixed = [replace(make_batch([0]), level_B=torch.tensor([level])) for level in (0.2, 0.5, 0.8)]

    def fixed_loss():
        with torch.no_grad():
            return sum(trainer.loss(batch).item() for batch in fixed) / len(fixed)

    before = fixed_loss()
    trainer.fit()
    assert fixed_loss() < 0.5 * before


def test_a_learning_rate_of_zero_moves_nothing(model):
    trainer = make_trainer(model, [make_batch([0])], options=full(), lr=0.0, steps=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}
    trainer.fit()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.trained.items())


def test_eight_bit_adamw_follows_adamw(model):
    pytest.importorskip("bitsandbytes")
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        recorder = Recorder()
        make_trainer(model, [make_batch([0, 1])], options=full(), optimizer=name, steps=20, callbacks=[recorder]).fit()
        losses[name] = [outcome.loss.item() for outcome in recorder.outcomes]
    assert losses["adamw_8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.02)
    assert losses["adamw"][-1] < 0.95 * losses["adamw"][0]


def test_a_text_encoder_is_trained_without_its_own_dropout(model):
    """Both move, and what each is in while a step runs: only the transformer in training."""
    batch = make_batch([0, 1])
    trainer = make_trainer(model, [batch], options=lora(text_encoder="lora"), steps=3)
    tokens = trainer.method.family.tokenize(trainer.method.family.load_tokenizers(), ["a red circle", "a blue one"])
    trainer.batches.batches = [replace(batch, text=tokens)]
    before = {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}
    modes = []
    for name, part in trainer.models.items():
        part.register_forward_pre_hook(lambda module, given, name=name: modes.append((name, module.training)))
    trainer.fit()
    assert set(modes) == {("transformer", True), ("text_encoder", False)}
    moved = {name.split(".")[0] for name, p in trainer.trained.items() if not torch.equal(p, before[name])}
    assert moved == {"transformer", "text_encoder"}
    trainer.set_training(False)
    assert not any(part.training for part in trainer.models.values())


def test_gradient_checkpointing_changes_no_number(model):
    rows = {}
    for checkpointing in (False, True):
        recorder = Recorder()
        trainer = make_trainer(model, [make_batch([0, 1])], options=lora(dropout=0.2), callbacks=[recorder])
        if checkpointing:
            trainer.models["transformer"].enable_gradient_checkpointing()
        trainer.fit()
        rows[checkpointing] = [(outcome.loss.item(), outcome.grad_norm.item()) for outcome in recorder.outcomes]
    assert rows[True] == rows[False]
