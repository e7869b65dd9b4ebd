"""Short runs of tiny models for the tests of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.runs import exact_rows
from tests.families.tiny import TINY

METHODS = {"lora": "method={name: lora, rank: 4, alpha: 8, dropout: 0.1}", "full": "method={name: full}"}


def settings(name: str, model: Path, clips: Path, tmp_path: Path) -> dict[str, Any]:
    """The config of a run of twenty steps in which clipping is at work, less its output."""
    row = TINY[name]
    given = {} if row.task == "text-to-video" else {"conditions": {row.conditions[0]: 0.5}}
    return {
        "model": {"path": str(model), "task": row.task},
        "data": {"train": str(clips), "buckets": [row.bucket], "cache": str(tmp_path / "cache"), **given},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 20, "batch_size": 2, "precision": "fp32", "max_grad_norm": 0.01},
        "validation": {"every": 0},
        "checkpoint": {"every": 10},
    }


def assert_close(one: Path, other: Path) -> None:
    """Losses, gradient norms, held-out losses and exported weights to 1e-5."""
    ours, theirs = exact_rows(one), exact_rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for left, right in zip(ours, theirs, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6), (other.name, left["step"])
    files = [sorted((run / "weights" / "latest").rglob("*.safetensors")) for run in (one, other)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] != []
    configs = [
        [path.read_text() for path in sorted((run / "weights" / "latest").rglob("*.json"))] for run in (one, other)
    ]
    assert configs[0] == configs[1]
    for path, twin in zip(*files, strict=True):
        left, right = load_file(path), load_file(twin)
        for key in left.keys() | right.keys():
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-5, msg=f"{other.name}: {key}")
