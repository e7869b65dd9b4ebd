"""What is trained and the optimizer's state on disk, in files that are small enough to be put together in memory."""

from __future__ import annotations

import torch
from torch import nn

from finetrainers.engines import state


def trained_and_optimizer(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (300, 10, 700, 10, 10)
    trained = {f"p{number}": nn.Parameter(torch.randn(n, generator=generator)) for number, n in enumerate(sizes)}
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return trained, optimizer


def test_a_state_in_several_files_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_FILE_BYTES", 2048)
    trained, optimizer = trained_and_optimizer(0)
    state.save(trained, optimizer, tmp_path, is_main=True, group=None)()
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    # Only what is larger by itself makes a larger file, and each has a header.
    assert len(sizes) > 4 and sum(size > 2048 + 1500 for size in sizes) == 0 and max(sizes) > 700 * 4
    others, other = trained_and_optimizer(1)
    state.load(others, other, tmp_path, group=None)
    for name, parameter in trained.items():
        assert torch.equal(parameter, others[name])
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other.state[others[name]][key]), key
