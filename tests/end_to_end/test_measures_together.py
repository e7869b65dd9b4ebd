"""Measures that change no number change none together either, and beside those that do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from finetrainers.cli import main
from tests.end_to_end.runs import exact_rows, write_config
from tests.families.deep import write_deep

FULL: dict[str, Any] = {"name": "full"}
BF16, EIGHT = "method.weights_dtype=bf16", "optimizer.name=adamw_8bit"
MOVED = ["optimizer.offload=true", "memory.offload_activations=true"]
CASES = {
    "full, all streamed": (FULL, [], ["memory.stream_blocks=all", *MOVED]),
    "full in bf16 and 8 bits, some streamed": (FULL, [BF16, EIGHT], ["memory.stream_blocks=3", *MOVED]),
    "lora in int8, some streamed": ({}, ["memory.base_weights=int8"], ["memory.stream_blocks=2", *MOVED]),
    "lora in nf4, every second block": (
        {},
        ["memory.base_weights=nf4"],
        [*MOVED, "training.gradient_checkpointing=every-2"],
    ),
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deep("ltx-0.9.0", tmp_path_factory.mktemp("deep") / "ltx")


@pytest.mark.parametrize("case", CASES)
def test_together_they_change_no_number(settings, tmp_path, deep, case):
    method, changing, moving = CASES[case]
    settings["model"]["path"] = str(deep)
    settings["method"] = method or settings["method"]
    settings["training"] |= {"steps": 3, "precision": "bf16", "gradient_checkpointing": True}
    settings["validation"]["every"] = 0
    config = write_config(tmp_path / "c.yaml", **settings)
    outputs = []
    for name, overrides in (("plain", changing), ("moved", [*changing, *moving])):
        outputs.append(tmp_path / name)
        assert (
            main(["train", str(config), f"output={outputs[-1]}", f"data.cache={tmp_path / 'cache'}", *overrides]) == 0
        )
    plain, moved = outputs
    assert exact_rows(plain) == exact_rows(moved) != []
    files = [sorted(output.glob("weights/latest/**/*.safetensors")) for output in outputs]
    assert len(files[0]) == len(files[1]) > 0
    for ours, theirs in zip(*files, strict=True):
        one, other = load_file(ours), load_file(theirs)
        assert one.keys() == other.keys()
        assert all(equal(one[key], other[key]) for key in one)
