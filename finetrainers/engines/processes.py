"""What the engines of several processes share: how the processes find each other and talk, and how weights that one of
them read reach the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from finetrainers.engines.base import Engine, replace_tensors, whole_tensors
from finetrainers.errors import UserError
from finetrainers.memory.streaming import BlockStream

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, who may be encoding a long clip or writing a large model."""


class Processes(Engine):
    """Processes that torchrun started, over NCCL on CUDA devices and gloo on CPUs."""

    def __init__(self, *, context_size: int = 1) -> None:
        """Each batch is taken by `context_size` processes together. Raises UserError when the processes do not make up
        whole groups of so many."""
        on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(self.device)
        shared, self.rank, self.world_size = next(rendezvous("env://", timeout=_PATIENCE))
        if self.world_size % context_size:
            raise UserError(
                f"parallel.context_parallel_size {context_size} does not divide {self.world_size} processes into whole "
                "groups; start a multiple of it with --nproc"
            )
        self.context_size = context_size
        # torchrun restarts processes over the store that those before them wrote to, addresses and all.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"attempt-{attempt}", shared)  # type: ignore[attr-defined]
        # gloo beside NCCL: what processes tell each other between steps lies on the host.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(
            backend, store=self._store, rank=self.rank, world_size=self.world_size, timeout=_PATIENCE
        )
        # A checkpoint is written while training goes on: its talk must not mix with the steps'.
        self._saving_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._rounds = 0

    def park(self, stream: BlockStream) -> None:
        # One block of them is whole on the device at a time.
        for block in stream.blocks:
            self.receive(block)
            stream.park(block)

    def prepare(
        self, models: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[nn.Module]], dtype: torch.dtype | None
    ) -> None:
        for model in models.values():
            self.receive(model)

    def backward(self, loss: Tensor) -> None:
        # Gradients are divided by the number of processes on their way; shares of a loss are to be added up.
        (loss * self.world_size).backward()

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.context_size

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

    def refuse_two_experts(self, models: Mapping[str, nn.Module], strategy: str) -> None:
        """Raise UserError for a strategy whose processes run the same layers together: of two experts each may need
        another."""
        if sum(name.startswith("transformer") for name in models) > 1:
            raise UserError(
                f"parallel.strategy {strategy} trains one expert at a time, because processes may need another one "
                "each: set model.experts to high_noise or low_noise, or take parallel.strategy ddp"
            )

    def receive(self, module: nn.Module) -> None:
        """Bring the parameters and buffers of a module to the device as the main process has them: one process reads a
        model, and no host holds it once for each of its devices. What is sharded is there already."""
        described: list[Any] = [[(tensor.shape, tensor.dtype) for tensor in whole_tensors(module)]]
        dist.broadcast_object_list(described, src=0)
        kinds = iter(described[0])

        def received(tensor: Tensor) -> Tensor:
            shape, dtype = next(kinds)
            if self.is_main:
                moved = tensor.to(self.device, copy=True).contiguous()
            else:
                moved = torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(moved, src=0)
            return moved

        replace_tensors(module, received)


def _handed_out(store: Any, key: str, count: int) -> Iterator[int]:
    """Numbers from a counter that all processes share."""
    while (number := store.add(key, 1) - 1) < count:
        yield number
