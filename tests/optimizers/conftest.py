"""What tests of optimizers may ask for."""

import pytest
import torch

from finetrainers.optimizers import host_states, size


@pytest.fixture
def all_moved(monkeypatch):
    """All tensors but single numbers move between host and device, since tiny models have no large ones."""
    for module in (host_states, size):
        monkeypatch.setattr(module, "SMALLEST_MOVED", 8)


@pytest.fixture(autouse=True)
def _not_compiled():
    """torchao compiles its update for each shape, which takes seconds each on a CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
