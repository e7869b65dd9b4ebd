"""Every family trains with its optimizer's state on the host, updates in the backward pass, and weights in bf16."""

import pytest
import torch
from safetensors.torch import load_file

from finetrainers.training.callback import Callback
from finetrainers.training.checkpoint import Checkpointer
from finetrainers.training.saving import gather_weights
from tests.optimizers.family_runs import FAMILIES, family_trainer
from tests.training.tiny_run import full, lora, optimizer_options


class Recorder(Callback):
    def __init__(self):
        self.rows = []

    def on_step_end(self, trainer, outcome):
        self.rows.append((outcome.loss.item(), outcome.grad_norm.item(), outcome.lr))


def trained(name, folders, method, *, saver=None, resume=False, dtype=torch.float32, name_of="adamw", **options):
    recorder = Recorder()
    callbacks = [recorder, *([saver] if saver else [])]
    chosen = lora(target_modules=["to_q", "to_v"], dropout=0.1) if method == "lora" else full(**options.pop("full", {}))
    trainer = family_trainer(
        name,
        folders[name],
        options=chosen,
        optimizer=optimizer_options(name_of, **options),
        dtype=dtype,
        callbacks=callbacks,
    )
    if resume:
        assert saver.resume(trainer, "auto")
    trainer.fit()
    return trainer, recorder.rows


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}


def assert_same(one, other):
    assert one.keys() == other.keys() != set()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_where_the_state_lies_and_when_it_is_used_changes_no_number(folders, all_moved, name, method):
    plain, rows = trained(name, folders, method)
    assert len({loss for loss, _, _ in rows}) == len(rows) == 3
    for options in ({"offload": True}, {"in_backward": True}, {"offload": True, "in_backward": True}):
        other, others = trained(name, folders, method, **options)
        assert others == rows, options
        assert_same(weights_of(plain), weights_of(other))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_in_bf16_resume_exactly_and_are_exported(folders, tmp_path, all_moved, name):
    """And the state may have moved in between."""
    ways = (
        {"full": {"weights_dtype": "bf16"}},
        {"full": {"weights_dtype": "bf16"}, "offload": True, "in_backward": True},
    )
    results = []
    for number, (options, later) in enumerate(((ways[0], ways[1]), (ways[1], ways[0]))):
        folder = tmp_path / str(number)
        saver = Checkpointer(folder, every=2, keep=None, identity={})
        whole, rows = trained(name, folders, "full", saver=saver, dtype=torch.bfloat16, **options)
        saver = Checkpointer(folder, every=0, keep=None, identity={})
        (folder / "step-00000003").rename(tmp_path / f"last-{number}")
        resumed, rest = trained(name, folders, "full", saver=saver, resume=True, dtype=torch.bfloat16, **later)
        assert rest == rows[2:] != []
        assert_same(weights_of(whole), weights_of(resumed))
        results.append(rows)
    assert results[0] == results[1]
    assert all(parameter.dtype in (torch.bfloat16, torch.float32) for parameter in whole.trained.values())
    share = sum(parameter.numel() for parameter in whole.trained.values() if parameter.dtype == torch.bfloat16)
    assert share > 0.9 * sum(parameter.numel() for parameter in whole.trained.values())
    weights = gather_weights(whole.engine, whole.method, whole.models)
    whole.method.save(whole.models, weights, tmp_path)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    kept = type(whole.models["transformer"]).from_pretrained(tmp_path / "transformer", dtype=torch.bfloat16)
    assert_same(
        dict(kept.state_dict()), {k: v.to(kept.state_dict()[k].dtype) for k, v in weights["transformer"].items()}
    )
