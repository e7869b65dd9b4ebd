"""Data parallelism: each process holds the whole model and takes its own batches; gradients are made one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from finetrainers.engines.base import Engine, Loss
from finetrainers.types import Batch

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, who may be encoding a long clip or writing a large model."""


class _Step(torch.nn.Module):
    """The loss as a module, because DistributedDataParallel wraps modules: all models, one forward."""

    def __init__(self, loss: Loss, models: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        self.models = torch.nn.ModuleDict(models)
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch)


class DDPEngine(Engine):
    """torch's DistributedDataParallel, over NCCL on CUDA devices and gloo on CPUs, started by torchrun."""

    def __init__(self) -> None:
        on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(self.device)
        shared, self.rank, self.world_size = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun restarts processes over the store that those before them wrote to, addresses and all.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"attempt-{attempt}", shared)  # type: ignore[attr-defined]
        # gloo beside NCCL: what processes tell each other between steps lies on the host.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(
            backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=_PATIENCE
        )
        self._step: DistributedDataParallel | None = None
        self._rounds = 0

    def spread(self, loss: Loss, models: Mapping[str, torch.nn.Module]) -> Loss:
        # Of two experts a batch asks one, and the other has no gradient from it.
        asks_some = sum(name.startswith("transformer") for name in models) > 1
        with warnings.catch_warnings():
            # The newer name of `broadcast_buffers` is not known to all versions of torch that we take.
            warnings.simplefilter("ignore", FutureWarning)
            self._step = DistributedDataParallel(
                _Step(loss, models),
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=asks_some,
                # Each process loaded the same weights and drew the same adapters.
                init_sync=False,
                broadcast_buffers=False,
            )
        return self._step

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        assert self._step is not None, "accumulate before spread"
        return nullcontext() if is_last else self._step.no_sync()

    def backward(self, loss: Tensor) -> None:
        # DistributedDataParallel divides by the number of processes; shares of a loss are to be added up.
        (loss * self.world_size).backward()

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def any(self, flag: bool) -> bool:
        # On the host, so that asking never waits for the device.
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def claim(self, count: int) -> Iterator[int]:
        self._rounds += 1
        return _handed_out(self._store, f"claim/{self._rounds}", count)

    def close(self) -> None:
        dist.destroy_process_group()


def _handed_out(store: Any, key: str, count: int) -> Iterator[int]:
    """Numbers from a counter that all processes share."""
    while (number := store.add(key, 1) - 1) < count:
        yield number
