"""What is refused of float8, in one line and before anything slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.commands.completing import check_arithmetic
from finetrainers.commands.opening import open_run
from finetrainers.config.load import build_config
from finetrainers.errors import UserError
from finetrainers.methods.find import find_method
from finetrainers.training.float8 import check_float8
from tests.families.tiny import TINY
from tests.training.tiny_run import OBJECTIVE, full


def config(recipe: str | None, **sections: Any) -> Any:
    method = {"name": "full", "float8_recipe": recipe}
    return build_config({"model": {"path": "x"}, "data": {"train": "y"}, "output": "z", "method": method} | sections)


def engine(device: str = "cpu", context_size: int = 1) -> Any:
    return SimpleNamespace(device=torch.device(device), context_size=context_size)


def test_torchao_is_needed(monkeypatch):
    monkeypatch.setattr("finetrainers.commands.completing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rowwise needs torchao: pip install 'finetrainers\[torchao\]'$"):
        check_arithmetic(config("rowwise"))
    check_arithmetic(config(None))


def test_fp32_is_refused():
    with pytest.raises(
        UserError, match=r"tensorwise is coarser .*fp32.*: set training.precision bf16, or leave it out$"
    ):
        check_arithmetic(config("tensorwise", training={"precision": "fp32"}))
    check_arithmetic(config(None, training={"precision": "fp32"}))
    check_arithmetic(config("tensorwise"))


CARDS = {
    ("tensorwise", (8, 0)): "compute capability 8.9 and up, and this one has 8.0: leave it out",
    ("rowwise", (8, 0)): "compute capability 9.0 and up, and this one has 8.0: leave it out",
    ("rowwise", (8, 9)): "and this one has 8.9: take tensorwise, or leave it out",
    ("tensorwise", (8, 9)): None,
    ("rowwise", (9, 0)): None,
    ("rowwise", (12, 0)): None,
}


@pytest.mark.parametrize(("recipe", "capability"), CARDS)
def test_the_gpu_must_have_such_products(folders, monkeypatch, recipe, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    method = find_method(
        full(float8_recipe=recipe), TINY["ltx-0.9.0"].open(folders["ltx-0.9.0"]), OBJECTIVE, dtype=torch.bfloat16
    )
    if said := CARDS[recipe, capability]:
        with pytest.raises(UserError, match=rf"^method.float8_recipe {recipe} needs a GPU .*{said}$"):
            check_float8(method, engine("cuda"))
    else:
        check_float8(method, engine("cuda"))


def test_split_tokens_and_models_that_do_not_suit_are_refused(folders):
    family = TINY["ltx-0.9.0"].open(folders["ltx-0.9.0"])
    method = find_method(full(float8_recipe="rowwise"), family, OBJECTIVE, dtype=torch.bfloat16)
    check_float8(method, engine())
    with pytest.raises(UserError, match=r"or set parallel.context_parallel_size 1$"):
        check_float8(method, engine(context_size=2))
    family.precise_layers = "to_|net"
    with pytest.raises(UserError, match=r"no linear layer .* multiples of 16: leave it out$"):
        check_float8(method, engine())
    plain = find_method(full(), family, OBJECTIVE, dtype=torch.bfloat16)
    check_float8(plain, engine(context_size=2))


def test_a_run_asks_before_it_begins(folders, monkeypatch):
    """And so does one whose memory is to be fitted, before that would find no option that helps."""
    asked = []
    monkeypatch.setattr("finetrainers.commands.opening.check_float8", lambda method, engine: asked.append(method))
    whole = config("rowwise", model={"path": str(folders["ltx-0.9.0"])}, memory={"budget": "24GB"})
    open_run(whole)
    assert [method.float8_recipe for method in asked] == ["rowwise"]
