"""A run whose blocks are compiled: losses and names of weights as of one whose are not, and an exact resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.runs import exact_rows, run, write_config

STEPS = 50


@pytest.mark.timeout(600)
def test_a_compiled_run_is_the_plain_one_and_resumes_exactly(settings, tmp_path):
    settings["validation"] |= {"every": 25}
    settings["checkpoint"]["every"] = 25

    def train(name: str, *options: str) -> tuple[list, dict[str, torch.Tensor], str]:
        config = write_config(tmp_path / "c.yaml", **settings | {"output": str(tmp_path / name)})
        code, said = run(["train", config, *options], tmp_path / f"{name}.log")
        assert code == 0, said
        weights = load_file(Path(tmp_path / name) / "weights" / "latest" / "pytorch_lora_weights.safetensors")
        return exact_rows(tmp_path / name), weights, said

    constant = "optimizer.lr_scheduler=constant"
    plain, plain_weights, said = train("plain", constant, f"training.steps={STEPS}")
    assert "compiled a block" not in said, "auto leaves blocks on a CPU as they are"
    compiled, weights, said = train("compiled", constant, f"training.steps={STEPS}", "training.compile=blocks")
    assert "compiled a block" in said
    assert compiled == [pytest.approx(row, rel=1e-5) for row in plain]
    assert compiled != plain, "other kernels round otherwise"
    assert weights.keys() == plain_weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, plain_weights[key], rtol=1e-3, atol=1e-5)
    train("halves", constant, "training.steps=25", "training.compile=blocks")
    halves, half_weights, _ = train("halves", constant, f"training.steps={STEPS}", "training.compile=blocks")
    assert halves == compiled
    assert all(torch.equal(half_weights[key], weights[key]) for key in weights)
