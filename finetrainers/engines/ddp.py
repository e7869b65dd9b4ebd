"""Data parallelism: each process holds the whole model and takes its own batches; gradients are made one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finetrainers.engines.base import Loss
from finetrainers.engines.processes import Processes
from finetrainers.types import Batch


class DDPEngine(Processes):
    """torch's DistributedDataParallel."""

    def spread(
        self, loss: Loss, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> Loss:
        loss = super().spread(loss, models, optimizer, max_grad_norm)
        # Of two experts a batch asks one, and the other has no gradient from it.
        asks_some = sum(name.startswith("transformer") for name in models) > 1
        # What does not move is no affair of DDP's, which would want it on the device: blocks that are streamed are not.
        moving = [each for model in models.values() for each in model.parameters() if each.requires_grad]
        with warnings.catch_warnings():
            # The newer name of `broadcast_buffers` is not known to all versions of torch that we take.
            warnings.simplefilter("ignore", FutureWarning)
            self._step = DistributedDataParallel(
                LossModule(loss, nn.ParameterList(moving)),
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=asks_some,
                # The weights are those of the main process already.
                init_sync=False,
                broadcast_buffers=False,
            )
        return self._step

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._step.no_sync()


class LossModule(nn.Module):
    """The loss as a module, because what spreads gradients wraps modules: all models, or what moves of them, and one
    forward."""

    def __init__(self, loss: Loss, models: nn.Module) -> None:
        super().__init__()
        self.models = models
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        """The loss of each sample."""
        return self.loss(batch)
