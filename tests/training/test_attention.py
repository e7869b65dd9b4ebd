"""The kernel that attention is computed by: first in torch's order as long as a run trains, and refused where it cannot
be had."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from finetrainers.cli import main
from finetrainers.commands import opening
from finetrainers.demo.clips import render_clips
from finetrainers.errors import UserError
from finetrainers.methods.base import Method
from finetrainers.training import attention
from finetrainers.training.attention import attention_by, check_attention
from tests.end_to_end.runs import write_config
from tests.families.tiny import TINY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NUMBERS = {"math": 0, "flash": 1, "efficient": 2, "cudnn": 3}


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


@pytest.mark.parametrize("option", NUMBERS)
def test_it_comes_first_in_the_block_and_no_longer(option):
    before = order()
    with pytest.raises(ZeroDivisionError), attention_by(option):
        assert order()[0] == NUMBERS[option]
        assert set(NUMBERS.values()) <= set(order())
        raise ZeroDivisionError
    assert order() == before
    with attention_by("auto"):
        assert order() == before


@pytest.mark.parametrize(("option", "name"), [("flash_3", "FA3"), ("flash_4", "FA4")])
def test_a_later_flash_attention_takes_the_place_of_torchs(option, name, monkeypatch):
    events = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", events.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: events.append("restored"))
    with attention_by(option):
        assert events == [name] and order()[0] == NUMBERS["flash"]
    assert events == [name, "restored"]


def test_a_run_trains_with_it(tmp_path, monkeypatch):
    clips = render_clips(tmp_path / "clips", 3, num_frames=10, height=64, width=96, fps=16.0).parent
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(TINY["ltx-0.9.0"].write(tmp_path / "model"))},
        data={"train": str(clips), "buckets": ["9x64x96"]},
        training={"precision": "fp32"},
        validation={"every": 0},
        output=str(tmp_path / "run"),
    )
    seen = []
    loss = Method.loss
    monkeypatch.setattr(opening, "check_attention", lambda *given: None)
    monkeypatch.setattr(Method, "loss", lambda *given: (seen.append(order()[0]), loss(*given))[1])
    assert main(["train", str(config), "training.attention=efficient", "training.steps=2", "--quiet"]) == 0
    assert seen == [NUMBERS["efficient"]] * 2
    assert main(["bench", str(config), "training.attention=cudnn", "--steps", "2"]) == 0
    assert seen[2] == NUMBERS["cudnn"], "operations are then counted on models without memory"


REFUSED = {
    "is for NVIDIA GPUs": ("flash", CPU, 9, True),
    r"flash_3 is for GPUs of compute capability 9.x, and this one has 8.x": ("flash_3", GPU, 8, True),
    "flash_4 needs flash_attn.cute.interface, which is not installed": ("flash_4", GPU, 10, False),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_had_is_refused(reason, monkeypatch):
    option, device, major, is_there = REFUSED[reason]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(attention, "find_spec", lambda name: SimpleNamespace() if is_there else None)
    with pytest.raises(UserError, match=reason):
        check_attention(option, device)
    check_attention("auto", device)
    check_attention("flash" if device == GPU else "auto", device)


def test_an_earlier_version_of_the_package_is_not_the_later_one(monkeypatch, tmp_path):
    """FlashAttention 2 alone, in which the module of a later one has no place."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match=r"flash_4 needs flash_attn\.cute\.interface, which is not installed"):
        check_attention("flash_4", GPU)


def test_what_can_be_had_is_not_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "find_spec", lambda name: SimpleNamespace())
    for option in (*NUMBERS, "flash_3", "flash_4"):
        check_attention(option, GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("option", NUMBERS)
def test_kernels_agree_on_a_gpu(option):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 4, 512, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    exact.sum().backward()
    expected = [tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    with attention_by(option):
        answer = torch.nn.functional.scaled_dot_product_attention(*tensors)
        answer.sum().backward()
    torch.testing.assert_close(answer.double(), exact, rtol=0, atol=2e-2)
    for tensor, gradient in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=2e-2)
