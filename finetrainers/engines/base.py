"""The contract of an engine: how a run is spread over processes. Training and encoding see only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers.engines import state
from finetrainers.memory.streaming import BlockStream, is_parked
from finetrainers.types import Batch

Loss = Callable[[Batch], Tensor]
"""A batch to the loss of each of its samples."""


class Engine(ABC):
    """One way of running a step on one or many processes. All of them run the same program; `rank` 0 is the main one,
    which alone writes and speaks."""

    device: torch.device
    rank: int
    world_size: int
    context_size = 1
    """Processes of following ranks that take the same batches and split their tokens between them."""
    _saving_group: Any = None
    """The processes that write a checkpoint together; None where there is one."""
    shares = False
    """Whether processes share the optimizer's state, rather than each holding all of it."""
    together = False
    """Whether a pass through the models needs all processes, each with a batch of its own."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Whose batches this process takes, of `data_size`."""
        return self.rank // self.context_size

    @property
    def data_size(self) -> int:
        """How many take batches of their own: processes, or groups of `context_size`."""
        return self.world_size // self.context_size

    @property
    def context_rank(self) -> int:
        """Which part of each batch's tokens this process takes."""
        return self.rank % self.context_size

    @property
    def generator(self) -> torch.Generator:
        """The device's own generator, from which modules draw, such as dropout. Seeding it costs microseconds, where
        `torch.manual_seed` looks for every kind of device."""
        if self.device.type == "cuda":
            torch.cuda.init()
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator

    # A step.

    def park(self, stream: BlockStream) -> None:
        """Take the weights of blocks that are streamed to the host, one block after the other. `prepare` comes after
        it, and leaves them there."""
        for block in stream.blocks:
            stream.park(block)

    def prepare(
        self, models: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[nn.Module]], dtype: torch.dtype | None
    ) -> None:
        """Bring the models to the device, in place, ready for forward passes. The main process has their weights; the
        others may have them on the meta device, and get them from it.

        `blocks` are the layers of each model that repeat; `dtype` is what linear layers with fp32 weights compute in,
        where that is another and may be made use of. Parameters are other objects afterwards.
        """
        for model in models.values():
            # Copied even on one device: weights mapped from a file are aligned as the file is, CPU kernels round by
            # alignment, and a resumed run must not.
            replace_tensors(model, lambda tensor: tensor.to(self.device, copy=True))

    def within_blocks(self, dtype: torch.dtype | None) -> str | None:
        """What it does in the middle of a block's pass, in words, where linear layers compute in `dtype` as `prepare`
        takes it; None is nothing, so that blocks can be compiled."""
        return "processes that split tokens exchange them within blocks" if self.context_size > 1 else None

    def held(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """How many numbers of these this process holds, and how many there are."""
        counts = [_held(tensor) for tensor in tensors]
        return sum(mine for mine, _ in counts), sum(every for _, every in counts)

    def spread(
        self, loss: Loss, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> Loss:
        """The loss as it is to be called in a step, so that its gradients become those of all processes; and what
        `step` then does with these. A norm of 0 leaves gradients as they are."""
        self._optimizer, self._max_grad_norm = optimizer, max_grad_norm
        return loss

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one forward and backward pass. Only after the last one of a step are the gradients those of
        all processes together."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the step's loss."""

    def step(self) -> Tensor:
        """Scale the gradients down to the largest norm that is allowed, apply them and drop them. Returns their global
        norm before, fp32, on this process's device."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        # As torch.nn.utils.clip_grad_norm_ does it, less its sorting by device and type, which takes as long again.
        gradients = [self._local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        groups = self._by_device(gradients)
        norms = [torch.stack(torch._foreach_norm(group, 2, torch.float32)).to(self.device) for group in groups]
        norm = self._global_norm(torch.linalg.vector_norm(torch.cat(norms)))
        if self._max_grad_norm > 0:
            scale = (self._max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
            for group in groups:
                torch._foreach_mul_(group, scale.to(group[0].device))
        self._optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _by_device(self, gradients: Sequence[Tensor]) -> list[list[Tensor]]:
        """Gradients on the device and on the host apart; those on the host have arrived."""
        groups: dict[torch.device, list[Tensor]] = {}
        for gradient in gradients:
            groups.setdefault(gradient.device, []).append(gradient)
        if self.device.type == "cuda" and torch.device("cpu") in groups:
            # They came on streams of their own, and the host is about to read them.
            torch.cuda.synchronize(self.device)
        return list(groups.values())

    def _local(self, gradient: Tensor) -> Tensor:
        """What this process holds of a gradient."""
        return gradient

    def _global_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from that of what this process holds."""
        return norm

    # What a run keeps.

    @property
    def layout(self) -> str | None:
        """What must be the same again for `load` to read what `save` wrote; None where any engine on any number of
        processes reads it."""
        return None

    def weights(self, model: nn.Module, *, trained_only: bool, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A model's whole state dict on the CPU of the main process, in `dtype` if one is given; empty on the others.
        With `trained_only`, only of it what moves."""
        found = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.requires_grad or not trained_only:
                whole = self._whole(tensor)
                if self.is_main:
                    # Of streamed blocks they are views of one buffer, which a file of safetensors does not take.
                    found[name] = whole.detach().to("cpu", dtype, copy=is_parked(tensor)).contiguous()
        return found

    def _whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of the state, at least on the main process."""
        return tensor

    def save(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, folder: Path
    ) -> Callable[[], None]:
        """Begin to write what is trained and the optimizer's state, as they are now, into a folder, by all processes.
        What is returned waits until all of them have written; it is called in a thread, and so talks to no process."""
        return state.save(trained, optimizer, folder, is_main=self.is_main, group=self._saving_group)

    def load(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Put back what `save` wrote, on as many processes as there are now."""
        state.load(trained, optimizer, folder, group=self._saving_group)

    # Between processes.

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all batches: over all processes, of which those that split a batch have the same."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of ranks, on every process."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Cheap enough for each step."""

    @abstractmethod
    def claim(self, count: int) -> Iterator[int]:
        """Numbers below `count`, each for one process alone, handed out as processes become free: one that works on a
        long item leaves the others to the rest. Each call is a round of its own, which every process calls."""

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What stands in the block is done by the main process, and by the others once it is through, say to find what
        it wrote."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def close(self) -> None:  # noqa: B027 - where there are others
        """Leave the other processes."""


def replace_tensors(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of each parameter and buffer of a module and of those under it, one by one in
    the order of `whole_tensors`. One that stands in several places is replaced once; what is sharded, and what lies on
    the host to be streamed, stays."""
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for tensors, name, old in _places(module):
        if id(old) not in held:
            new = replace(old.detach())
            # The old one's place in memory is kept from being given to another while its number is known.
            held[id(old)] = old, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        tensors[name] = held[id(old)][1]


def whole_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module and of those under it that are neither sharded nor streamed, each once."""
    return list({id(tensor): tensor for _, _, tensor in _places(module)}.values())


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not is_sharded(tensor) and not is_parked(tensor):
                    yield tensors, name, tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a share of a tensor, as FSDP's or DeepSpeed's do."""
    return hasattr(tensor, "placements") or hasattr(tensor, "ds_id")


def _held(tensor: Any) -> tuple[int, int]:
    if hasattr(tensor, "ds_id"):
        return tensor.ds_tensor.numel(), tensor.ds_numel
    return (tensor.to_local() if is_sharded(tensor) else tensor).numel(), tensor.numel()
