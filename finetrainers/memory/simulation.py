"""A step without data: tensors that have a shape, a type and a place but no memory, and the bytes that they would
take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SIMULATED = torch.device("cpu")
"""Where simulated models lie. As on a CPU, attention is torch's flash attention and saves what that saves on a GPU
(queries, keys, values, their answer and a number a row), and the autocast of a CPU makes the copies of that of a GPU.
"""
HOST = torch.device("meta")
"""What stands for the host in a simulation, so that its bytes are told from the device's."""


@contextmanager
def simulation() -> Iterator[None]:
    """In the block tensors have no memory, and whatever runs is the very program of a step: `model.to_empty` brings a
    model of the meta device into it. Real tensors may take part.

    What asks for a number of a tensor fails. What is made here must not be used after it, and is not to be found in a
    cache that others read.
    """
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def saved_bytes(forward: Callable[[], Tensor], models: Iterable[nn.Module]) -> int:
    """Bytes that autograd keeps for the backward pass of what `forward` computes, on whatever device, real or
    simulated; what belongs to the models is not counted, and what is saved several times counts once.

    Only what reaches autograd's outermost hooks is seen: of blocks that are computed again their inputs, and of blocks
    whose activations are offloaded nothing.
    """
    sizes: dict[int, int] = {}
    own = {_storage(tensor) for model in models for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, _as_it_is):
        answer = forward()
    # What is saved stays alive until here, so that no two tensors had one place.
    del answer
    return sum(sizes.values())


@dataclass(frozen=True)
class Peak:
    """Bytes on the simulated device beyond what was there before the step."""

    peak: int
    """The most at any time of the forward and the backward pass."""
    after_forward: int
    """Kept for the backward pass."""
    after_backward: int
    """What is left: gradients that were not there before."""


def peak_bytes(forward: Callable[[], Tensor], device: torch.device = SIMULATED) -> Peak:
    """What a step holds: `forward` gives a loss, whose gradient is computed. Memory that a kernel takes for itself is
    not seen."""
    live = LiveBytes(device)
    with live.counted():
        loss = forward().sum()
        after_forward = live.now
        loss.backward()
        del loss
        return Peak(live.peak, after_forward, live.now)


class LiveBytes:
    """Counts the bytes of tensors that operations made and that are still alive, on one kind of device."""

    def __init__(self, device: torch.device = SIMULATED) -> None:
        self.now = 0
        self.peak = 0
        self._device = device
        self._known: set[int] = set()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """In the block, operations are watched."""
        from torch.utils._python_dispatch import TorchDispatchMode

        watch = self._watch

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                answer = func(*args, **(kwargs or {}))
                watch((args, kwargs), answer)
                return answer

        with Watch():
            yield

    def _watch(self, given: Any, made: Any) -> None:
        # What shares memory with an input was there before, or is counted already.
        old = {_storage(tensor) for tensor in tensors_in(given)}
        for tensor in tensors_in(made):
            key = _storage(tensor)
            if tensor.device.type == self._device.type and key not in self._known and key not in old:
                self._add(key, tensor.untyped_storage())

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an operation's arguments or answer."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
