"""Fully sharded data parallelism: each process holds a share of every weight, gradient and optimizer state, and takes
its own batches; a layer's weights are put together when it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from finetrainers.engines.processes import Processes
from finetrainers.errors import UserError


class FSDPEngine(Processes):
    """torch's FSDP2, `fully_shard`, by repeating layers."""

    shares = True
    together = True

    def __init__(self, *, context_size: int = 1, shard_size: int | None = None, offload: bool = False) -> None:
        """Weights are shared by groups of `shard_size` processes, by default all. With `offload`, what is not at work
        lies on the host.

        Raises UserError when the processes do not make up whole groups.
        """
        super().__init__(context_size=context_size)
        # A warning for who would change a model's answer in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        size = shard_size or self.world_size
        if self.world_size % size:
            raise UserError(f"parallel.shard_size {size} does not divide {self.world_size} processes into whole groups")
        # Two dimensions only where there is something to replicate: a group of one would still be talked to.
        if size == self.world_size:
            self._mesh = init_device_mesh(self.device.type, (size,), mesh_dim_names=("shard",))
        else:
            groups = self.world_size // size
            self._mesh = init_device_mesh(self.device.type, (groups, size), mesh_dim_names=("replicate", "shard"))
        self._offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()

    def prepare(
        self, models: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[nn.Module]], dtype: torch.dtype | None
    ) -> None:
        self.refuse_two_experts(models, "fsdp")
        for name, model in models.items():
            # One layer is whole on the device at a time.
            for block in blocks[name]:
                self.receive(block)
                self._shard(block, dtype, again=True)
            self.receive(model)
            # A text encoder of transformers records its hidden states by the name of its class, which sharding changes;
            # its embeddings stay whole.
            if name.startswith("transformer"):
                self._shard(model, dtype, again=None)

    def within_blocks(self, dtype: torch.dtype | None) -> str | None:
        if dtype is not None:
            return "under full fine-tuning fsdp collects linear layers in bf16 within blocks, to send half as much"
        return super().within_blocks(dtype)

    def _shard(self, module: nn.Module, dtype: torch.dtype | None, *, again: bool | None) -> None:
        """Share out the weights of a module, as far as it was not done by layers within. They travel together, linear
        layers in `dtype`; `again` is whether they are let go after the forward pass, which None leaves to torch."""
        share = partial(fully_shard, mesh=self._mesh, offload_policy=self._offload, reshard_after_forward=again)
        if dtype is not None and (linears := list(_linears(module))):
            share(linears, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, None, False))
        share(module, mp_policy=MixedPrecisionPolicy())

    def _local(self, gradient: Tensor) -> Tensor:
        assert isinstance(gradient, DTensor)
        return gradient.to_local()

    def _global_norm(self, norm: Tensor) -> Tensor:
        square = norm.square()
        dist.all_reduce(square, group=self._mesh["shard"].get_group())
        return square.sqrt()

    def _whole(self, tensor: Tensor) -> Tensor:
        # Put together, it may be part of a tensor that is filled up to equal shares.
        return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers that are not yet sharded."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and not isinstance(part.weight, DTensor):
            yield part
