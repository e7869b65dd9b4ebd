"""The table of optimizers is whole, each does what its row says, and what cannot work is refused in one line."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from finetrainers.config.schema import OptimizerConfig, TrainingConfig
from finetrainers.errors import UserError
from finetrainers.optimizers import build
from finetrainers.optimizers.build import can_be_shared, check_optimizer
from finetrainers.optimizers.by_tensor import ByTensor, InBackward
from finetrainers.optimizers.kinds import KINDS, defaults
from tests.families.tiny import TINY
from tests.optimizers.tensors import differing, make_optimizer, make_tensors, take_steps
from tests.training.tiny_run import full, make_batch, make_trainer


def test_the_schema_takes_the_names_of_the_table():
    assert get_args(OptimizerConfig.model_fields["name"].annotation) == tuple(KINDS)


def test_each_extra_is_declared():
    tomllib = pytest.importorskip("tomllib")
    with open("pyproject.toml", "rb") as file:  # noqa: PTH123
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert {kind.extra for kind in KINDS.values() if kind.extra} <= extras.keys()


@pytest.mark.parametrize("name", KINDS)
def test_each_option_that_it_takes_changes_its_steps_and_no_other_is_filled_in(name):
    plain = make_tensors()
    take_steps(make_optimizer(name, plain), plain, range(3))
    changes = {"betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 10.0, "lr": 0.02}
    for option, value in changes.items():
        if option in (*KINDS[name].takes, "lr"):
            tensors = make_tensors()
            take_steps(make_optimizer(name, tensors, **{option: value}), tensors, range(3))
            assert differing(plain, tensors), option
    filled = {key.removeprefix("optimizer.") for key in defaults(name)} - {"lr"}
    assert filled == set(KINDS[name].takes) - {"weight_decay"}
    assert defaults("prodigy")["optimizer.lr"] == 1 and "optimizer.lr" not in defaults("adamw")


def test_muon_takes_the_matrices_and_adamw_the_rest():
    tensors, alone = make_tensors(), make_tensors()
    take_steps(make_optimizer("muon", tensors), tensors, range(3))
    take_steps(make_optimizer("adamw", alone), alone, range(3))
    assert differing(tensors, alone) == [name for name, tensor in tensors.items() if tensor.ndim == 2]
    update = tensors["layer.7"] - make_tensors()["layer.7"]
    # Orthogonal steps of AdamW's size, 0.2 of the learning rate in the root mean square, in directions that differ.
    assert 0.1e-3 < update.square().mean().sqrt().item() / 3 < 0.3e-3


def test_adamw_alone_stays_one_kernel_over_all():
    assert type(make_optimizer("adamw", make_tensors())) is torch.optim.AdamW
    assert type(make_optimizer("adamw", make_tensors(), offload=True)) is ByTensor
    assert type(make_optimizer("adamw", make_tensors(torch.bfloat16))) is ByTensor
    assert type(make_optimizer("adamw", make_tensors(), in_backward=True)) is InBackward


BF16 = {"weights_dtype": "bf16"}
UNCLIPPED = {"max_grad_norm": 0}
# Options of `optimizer` and of `training`, where they run, and what the refusal says.
REFUSED = [
    ({"name": "adafactor", "betas": (0.9, 0.99)}, {}, {}, "optimizer.betas is not used by adafactor"),
    ({"name": "adafactor", "eps": 1e-8}, {}, {}, "optimizer.eps is not used by adafactor"),
    ({"name": "prodigy", "lr": 0}, {}, {}, "optimizer.lr 0 is not taken by prodigy"),
    ({"name": "prodigy", "offload": True}, {}, {}, "offload updates one tensor at a time, and prodigy"),
    ({"name": "prodigy", "in_backward": True}, UNCLIPPED, {}, "in_backward updates one tensor at a time, and prodigy"),
    ({"name": "prodigy"}, {}, BF16, "weights_dtype bf16 updates one tensor at a time, and prodigy"),
    ({"name": "paged_adamw_8bit", "offload": True}, {}, {}, "moves to the host by itself"),
    *[({"name": name}, {}, {"shares": True}, f"{name} keeps its state whole") for name in KINDS if name != "adamw"],
    ({"offload": True}, {}, {"shares": True}, "optimizer.offload needs each process .* take parallel.offload"),
    ({"in_backward": True}, {}, {"shares": True}, "optimizer.in_backward needs each process .* take parallel.offload"),
    ({}, {}, {"shares": True, **BF16}, "weights_dtype bf16 needs each process .* take parallel.offload"),
    ({}, {"precision": "fp32"}, BF16, "set training.precision to bf16"),
    ({"in_backward": True}, {}, {}, "set training.max_grad_norm to 0"),
    ({"in_backward": True}, {**UNCLIPPED, "gradient_accumulation_steps": 2}, {}, "raise training.batch_size"),
    ({"in_backward": True}, UNCLIPPED, {"num_processes": 2}, "or run in one process"),
]


@pytest.mark.parametrize(("options", "training", "where", "said"), REFUSED)
def test_what_cannot_work_is_refused(options, training, where, said):
    with pytest.raises(UserError, match=said) as caught:
        check_optimizer(OptimizerConfig(**options), TrainingConfig(**training), **where)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", KINDS)
def test_the_rest_is_let_through(name):
    kind = KINDS[name]
    check_optimizer(OptimizerConfig(name=name), TrainingConfig())
    if kind.alone:
        together = OptimizerConfig(name=name, in_backward=True, offload=not kind.pages)
        check_optimizer(together, TrainingConfig(max_grad_norm=0), weights_dtype="bf16")
    assert can_be_shared(OptimizerConfig(name=name), None) == (name == "adamw")
    assert not can_be_shared(OptimizerConfig(name=name, offload=True), None)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.module])
def test_what_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    kind = KINDS[name]
    monkeypatch.setattr(build, "find_spec", lambda module: None if module == kind.module else SimpleNamespace())
    with pytest.raises(UserError, match=rf"pip install 'finetrainers\[{kind.extra}\]'"):
        check_optimizer(OptimizerConfig(name=name), TrainingConfig())


@pytest.mark.parametrize("name", KINDS)
def test_each_learns_one_batch(tmp_path, name):
    """At the learning rate that makes sense for it."""
    model = TINY["ltx-0.9.0"].write(tmp_path)
    lr = KINDS[name].lr or 1e-3
    trainer = make_trainer(model, [make_batch([0, 1])], options=full(), optimizer=name, lr=lr, steps=40)
    before = trainer.loss(make_batch([0, 1])).mean().item()
    trainer.fit()
    print(name, before, trainer.loss(make_batch([0, 1])).mean().item())
    assert trainer.loss(make_batch([0, 1])).mean().item() < 0.9 * before
