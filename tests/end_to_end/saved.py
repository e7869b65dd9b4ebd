"""What a run's checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from finetrainers.folder import steps_in
from finetrainers.training.checkpoint import TENSORS


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint that one process wrote: `trained/NAME` and the optimizer's state."""
    return load_file(next((checkpoint / TENSORS).glob("*.safetensors")))


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run's last checkpoint, by name."""
    tensors = saved_tensors(list(steps_in(run / "checkpoints").values())[-1])
    return {key.removeprefix("trained/"): value for key, value in tensors.items() if key.startswith("trained/")}
