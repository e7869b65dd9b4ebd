"""The state of every random generator of the process, as tensors. Runs draw from keyed generators and need none of it;
it is kept so that a library that draws from a global one is resumed exactly as well."""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch
from torch import Tensor


def seed_random_state(seed: int) -> None:
    """Put every generator of the process where this seed puts it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def read_random_state(device: torch.device) -> dict[str, Tensor]:
    """Python's, NumPy's, torch's and, on CUDA, the device's."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    state = {
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def write_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put each generator where it was."""
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
