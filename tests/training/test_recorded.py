"""Recorded passes: replayed, a pass gives the numbers that it gives when Python runs it, whatever came between. CUDA
graphs are emulated on a CPU, operation by operation, on the memory that was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetrainers.commands.completing import build_method, complete
from finetrainers.commands.opening import check_recording
from finetrainers.config.load import build_config
from finetrainers.errors import UserError
from finetrainers.training.callback import Callback
from finetrainers.training.recorded import CudaGraphs, Pass, RecordedPasses
from finetrainers.types import Batch, Bucket, Condition
from tests.families.tiny import TINY
from tests.training.emulated import Emulated
from tests.training.test_compiling import batch_of, load, open_method
from tests.training.tiny_run import full, lora, make_batch, make_trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))


class Losses(Callback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_step_end(self, trainer, outcome):
        self.losses.append(outcome.loss.item())
        self.norms.append(outcome.grad_norm.item())


def run(model, recorder, batches, **options):
    seen = Losses()
    trainer = make_trainer(model, batches, callbacks=[seen], recorder=recorder, **options)
    trainer.fit()
    return seen, trainer


# Sizes of one, two and three samples, which come back in another order.
BATCHES = [
    make_batch([0]),
    make_batch([1]),
    make_batch([2, 3]),
    make_batch([4]),
    make_batch([5, 6]),
    make_batch([7, 8, 9]),
]
CASES = {
    "lora": {},
    "lora in bf16": {"dtype": torch.bfloat16},
    "lora with dropout": {"options": lora(dropout=0.3)},
    "full": {"options": full()},
    "full in bf16, fp32 weights": {"options": full(), "dtype": torch.bfloat16},
    "full in bf16 weights": {"options": full(weights_dtype="bf16"), "dtype": torch.bfloat16},
    "full in float8": {"options": full(float8_recipe="tensorwise"), "dtype": torch.bfloat16, "steps": 13},
    "accumulated": {"gradient_accumulation_steps": 3, "steps": 10},
    "accumulated, full": {"gradient_accumulation_steps": 2, "options": full(), "steps": 10},
    "adafactor": {"optimizer": "adafactor"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_run(model, case):
    options = {"steps": 20} | CASES[case]
    plain, expected = run(model, None, BATCHES, **options)
    recorder = Emulated()
    seen, trainer = run(model, recorder, BATCHES, **options)
    assert seen.losses == plain.losses and seen.norms == plain.norms
    for name, parameter in expected.trained.items():
        assert torch.equal(parameter, trainer.trained[name]), name
    # Three sizes came back; of accumulated ones, each by the samples of its step.
    assert recorder.count >= 3
    assert all(parameter.grad is None for parameter in trainer.trained.values())


NAMES = [name for name in TINY if not name.startswith("own") and name != "ltx-bundled" and "a14b" not in name]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_passes_of_every_family_can_be_recorded(name, checkpointing, tmp_path):
    """A second clip at another noise level gets its own numbers, and all that a pass reads beside it stays."""
    row = TINY[name]
    method = open_method(row, row.write(tmp_path / "model"))
    models = load(method, tmp_path, checkpointing=checkpointing)
    trained = list(method.trained(models).values())
    condition = Condition.parse(row.conditions[-1])
    blank = batch_of(method, Bucket.parse(row.bucket), condition)
    batches = [varied(blank, number) for number in range(3)]

    def passed(batch: Batch, num_samples: int) -> Tensor:
        share = method.loss(models, batch).sum() / num_samples
        share.backward()
        return share.detach()

    def answers(run: Pass) -> list[Tensor]:
        found = []
        for batch in batches:
            found.append(run(batch, 2))
            found += [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
            for parameter in trained:
                parameter.grad = None
        return found

    expected = answers(passed)
    recorder = Emulated()
    seen = answers(passes := RecordedPasses(passed, recorder, trained))
    assert len(seen) == len(expected) > len(batches) and recorder.count == 1
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
    losses = [tensor for tensor in expected if tensor.dim() == 0]
    assert len({loss.item() for loss in losses}) == len(batches), "each batch has a loss of its own"
    # What the family keeps from pass to pass is there in a recording of its own, too.
    kept = others(recorder.outside, models, passes)
    answers(passes := RecordedPasses(passed, recorder, trained))
    assert others(recorder.outside, models, passes) == kept


def varied(batch: Batch, number: int) -> Batch:
    """Another clip of the same size: its numbers, noise, level and rate."""
    generator = torch.Generator().manual_seed(10 + number)

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    latents = drawn(batch.latents_BCFHW)
    given = {key: latents if key == "latents" else tensor for key, tensor in batch.given.items()}
    return replace(
        batch,
        latents_BCFHW=latents,
        noise_BCFHW=drawn(batch.noise_BCFHW),
        level_B=torch.full_like(batch.level_B, 0.2 + 0.3 * number),
        given=given,
        fps_B=batch.fps_B + 5 * number,
    )


def others(outside: dict[int, Tensor], models: Mapping[str, torch.nn.Module], passes: RecordedPasses) -> set[int]:
    """Places of tensors that belong neither to the models nor to what a recording is given and gives."""
    own = [tensor for model in models.values() for tensor in (*model.parameters(), *model.buffers())]
    own += passes._gradients.values()
    for recording in passes._recordings.values():
        own.append(recording.share)
        own += recording.given.tensors
    return set(outside) - {tensor.untyped_storage()._cdata for tensor in own}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_graphs_give_the_numbers_of_the_run(model, case):
    options = {"steps": 20} | CASES[case]
    plain, expected = run(model, None, BATCHES, **options)
    seen, trainer = run(model, CudaGraphs(torch.device("cuda")), BATCHES, **options)
    assert seen.losses == pytest.approx(plain.losses, rel=1e-6)
    for name, parameter in expected.trained.items():
        torch.testing.assert_close(trainer.trained[name], parameter, rtol=1e-4, atol=1e-6, msg=name)


REFUSED = {
    "is for one process": ({}, {"world_size": 2}),
    "leave memory.stream_blocks out": ({"memory": {"stream_blocks": "all"}}, {}),
    "leave memory.offload_activations out": ({"memory": {"offload_activations": True}}, {}),
    "leave optimizer.in_backward out": ({"optimizer": {"in_backward": True}}, {}),
    "memory.on_oom adapt": ({"memory": {"on_oom": "adapt"}}, {}),
    "set method.text_encoder frozen": ({"method": {"text_encoder": "lora"}}, {}),
    "set method.dropout 0, or training.gradient_checkpointing none": ({"method": {"dropout": 0.1}}, {}),
    "takes an NVIDIA GPU": ({}, {"device": torch.device("cpu")}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_recorded_is_refused(reason, model):
    sections, state = REFUSED[reason]
    check(model, {"training": {"cuda_graphs": False}} | sections, state)
    with pytest.raises(UserError, match=rf"training\.cuda_graphs .*{reason}"):
        check(model, {"training": {"cuda_graphs": True}} | sections, state)


def test_what_can_be_recorded_is_not_refused(model, tmp_path):
    for sections in ({}, {"method": {"name": "full"}}, {"training": {"gradient_accumulation_steps": 2}}):
        check(model, {"training": {"cuda_graphs": True}} | sections, {})
    dropout = {"cuda_graphs": True, "gradient_checkpointing": "none"}
    check(model, {"training": dropout, "method": {"dropout": 0.1}}, {})
    row = TINY["wan-2.2-a14b"]
    folder = row.write(tmp_path / "model")
    with pytest.raises(UserError, match=r"training\.cuda_graphs .*two experts.*model\.experts"):
        check(folder, {"training": {"cuda_graphs": True}}, {})
    check(folder, {"training": {"cuda_graphs": True}, "model": {"experts": "high_noise"}}, {})


def check(folder: Path, sections: dict[str, Any], state: dict[str, Any]) -> None:
    content = {"data": {"train": "clips"}, "output": "run"} | sections
    content["model"] = {"path": str(folder)} | sections.get("model", {})
    family, config = complete(build_config(content))
    engine: Any = SimpleNamespace(**({"device": torch.device("cuda"), "world_size": 1, "shares": False} | state))
    check_recording(config, engine, build_method(family, config))
