"""A tiny model, a few rendered clips and a config that trains on them in a second."""

import copy
from pathlib import Path
from typing import Any

import pytest

from finetrainers.demo.clips import render_clips
from tests.families.tiny import TINY


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("models") / "ltx")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips, so that batches of two leave one over."""
    folder = tmp_path_factory.mktemp("clips")
    return render_clips(folder, 5, num_frames=18, height=64, width=96, fps=16.0).parent


@pytest.fixture
def settings(model: Path, clips: Path, tmp_path: Path) -> dict[str, Any]:
    """A whole config as a dict, to be changed and written by the test."""
    return copy.deepcopy(
        {
            "model": {"path": str(model)},
            "data": {"train": str(clips), "buckets": ["9x64x96"], "validation": 0.2, "num_workers": 1},
            "method": {"name": "lora", "rank": 4, "alpha": 8},
            "optimizer": {"lr": 1e-3, "lr_scheduler": "cosine"},
            "training": {"steps": 8, "batch_size": 2, "precision": "fp32", "gradient_checkpointing": False},
            "validation": {"every": 4, "num_inference_steps": 2, "num_videos": 1},
            "checkpoint": {"every": 3},
            "output": str(tmp_path / "run"),
        }
    )
