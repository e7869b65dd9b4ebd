"""Adapters in fp32 that compute with copies in bf16, made once a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetrainers.methods.lora import CastingLinear
from tests.families.tiny import TINY
from tests.training.tiny_run import full, make_batch, make_trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("models") / "ltx")


def casting_layers(trainer) -> list[CastingLinear]:
    return [module for model in trainer.models.values() for module in model.modules() if hasattr(module, "cast")]


def test_copies_are_those_of_the_weights_after_every_step(model):
    trainer = make_trainer(model, [make_batch([0, 1])], dtype=torch.bfloat16)
    layers = casting_layers(trainer)
    assert len(layers) == 2 * 2 * 2 * 4, "A and B of four projections of two attentions of two blocks"
    stream = trainer.batches.start(0)
    places = [layer.cast.data_ptr() for layer in layers]
    for _ in range(3):
        before = [layer.cast.clone() for layer in layers]
        trainer.step(stream)
        assert all(torch.equal(layer.cast, layer.weight.bfloat16()) for layer in layers)
        assert any(not torch.equal(layer.cast, old) for layer, old in zip(layers, before, strict=True))
    assert [layer.cast.data_ptr() for layer in layers] == places
    assert not any("cast" in name for each in trainer.models.values() for name in each.state_dict())
    assert trainer.method.copied_bytes(trainer.models) == sum(layer.cast.nbytes for layer in layers)


def test_a_run_that_goes_on_computes_with_what_was_loaded(model):
    trainer = make_trainer(model, [make_batch([0])], dtype=torch.bfloat16, steps=0)
    layers = casting_layers(trainer)
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(1.0)
    trainer.fit()
    assert all(torch.equal(layer.cast, layer.weight.bfloat16()) for layer in layers)


def test_losses_and_gradients_are_those_of_casts_at_every_call(model):
    batch = make_batch([0, 1, 2])
    answers = []
    for copied in (True, False):
        trainer = make_trainer(model, [batch], dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        for layer in casting_layers(trainer):
            with torch.no_grad():
                layer.weight.add_(torch.randn(layer.weight.shape, generator=generator) * 0.1)
            layer.cast = layer.weight.detach().bfloat16() if copied else None
        loss = trainer.loss(batch)
        loss.sum().backward()
        answers.append((loss, {name: parameter.grad for name, parameter in trainer.trained.items()}))
    assert torch.equal(answers[0][0], answers[1][0])
    for name, gradient in answers[0][1].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, answers[1][1][name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("options", "dtype"), [(None, torch.float32), (full(), torch.bfloat16)])
def test_nothing_is_copied_where_nothing_is_cast(model, options, dtype):
    trainer = make_trainer(model, [make_batch([0])], options=options, dtype=dtype)
    assert all(layer.cast is None for layer in casting_layers(trainer))
    assert trainer.method.copied_bytes(trainer.models) == 0
