"""Activations that lie in the host's memory from the forward pass until the backward pass needs them.

What a block saves is sent when the block is through, while the next one computes; when the backward pass comes to a
block, what the one before it saved is fetched meanwhile. Tensors are sent by their storage, once, however many
operations and blocks saved it, and however much of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 64 * 1024
"""Bytes from which a tensor is sent. To start a copy takes about 10 microseconds, in which 250 KB cross PCIe 4; what is
smaller is not worth the two that it would need, and adds up to little."""


class HostMemory:
    """Buffers on the host, kept for the next step, and the copies to and from them, which run beside the device's
    computing. All are made on one stream, so that no buffer is written anew before it has been read."""

    def __init__(self, host: torch.device | None = None) -> None:
        """`host` is left out but where a simulation must tell the host's bytes from the device's."""
        self._host = host or torch.device("cpu")
        self._free: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def copying(self, device: torch.device) -> Iterator[None]:
        """Copies of the block begin once the device has done what it was asked to do until now. Without a GPU they are
        done at once."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    def copied(self) -> torch.cuda.Event | None:
        """What comes to pass when the copies that were asked for until now are made; None if they are."""
        return None if self._stream is None else self._stream.record_event()

    def take(self, num_bytes: int) -> Tensor:
        """A buffer of at least this size, page-locked where there is a GPU: the smallest free one that is large enough,
        or a new one in the place of one that is not, so that sizes that change do not add up."""
        fitting = [index for index, buffer in enumerate(self._free) if buffer.numel() >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].numel()))
        if self._free:
            self._free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._host, pin_memory=self._stream is not None)

    def give_back(self, buffer: Tensor) -> None:
        """Keep a buffer for later use."""
        self._free.append(buffer)


class ActivationOffloader:
    """Runs the blocks of one transformer and sends what they save to the host, but for the last one, whose backward
    pass comes right away."""

    def __init__(self, num_blocks: int, memory: HostMemory) -> None:
        self._last = num_blocks - 1
        self._memory = memory
        self._before: _Saved | None = None
        self._known = _Known()

    def run(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """What `function`, which is block number `index`, makes of its inputs, of which the first is a tensor on the
        device. Blocks run in the order of their numbers."""
        if index == 0:
            # Not cleared: the backward pass of an earlier forward pass may be still to come.
            self._before, self._known = None, _Known()
        before, saved = self._before, _Saved(self._memory, self._known, args[0].device)
        if index == self._last:
            answer = function(*args)
        else:
            with saved_tensors_hooks(saved.pack, _unpack):
                answer = function(*args)
        if before is not None:
            before.let_go()
        saved.send()
        self._before = None if index == self._last else saved

        def fetch(gradient: Tensor) -> None:
            for each in (saved, before):
                if each is not None:
                    each.fetch()

        for tensor in answer if isinstance(answer, tuple) else (answer,):
            if tensor.requires_grad:
                tensor.register_hook(fetch)
        return answer


_Known = weakref.WeakKeyDictionary[torch.UntypedStorage, "weakref.ref[_Stored]"]


class _Stored:
    """One storage that was saved: on the device, on the host, or on both. Lives as long as autograd has use for it."""

    def __init__(self, tensor: Tensor, memory: HostMemory) -> None:
        whole = tensor.untyped_storage().nbytes() // tensor.itemsize
        # Of uint8, because one storage may be saved in several types.
        self._on_device: Tensor | None = tensor.detach().as_strided((whole,), (1,), 0).view(torch.uint8)
        self._size = self._on_device.numel()
        self._device = tensor.device
        self._on_host: Tensor | None = None
        self._memory = memory
        self._coming: torch.cuda.Event | None = None
        self.version = tensor._version
        self._is_modified = False

    @property
    def is_away(self) -> bool:
        """Whether the device has let go of it."""
        return self._on_device is None

    def send(self) -> None:
        """Copy it to the host."""
        if self._on_host is None:
            assert self._on_device is not None
            self._on_host = self._memory.take(self._size)
            self._on_host[: self._size].copy_(self._on_device, non_blocking=True)

    def let_go(self) -> None:
        """Keep only what is on the host; the copy must be made, or waited for."""
        if self._on_device is not None:
            self._is_modified |= self._on_device._version != self.version
            self._on_device = None

    def make_room(self) -> None:
        """Take the memory on the device that `fetch` fills."""
        # Taken while the stream that computes is the current one, it may be given to others as soon as that is done.
        self._on_device = torch.empty(self._size, dtype=torch.uint8, device=self._device)

    def fetch(self) -> None:
        """Copy it to the device."""
        assert self._on_device is not None and self._on_host is not None
        self._on_device.copy_(self._on_host[: self._size], non_blocking=True)

    def expect(self, coming: torch.cuda.Event | None) -> None:
        """It is there once this comes to pass."""
        self._coming = coming

    def on_device(self) -> Tensor:
        """Its bytes on the device."""
        _refuse_modified(self._is_modified)
        assert self._on_device is not None
        self._arrive()
        return self._on_device

    def _arrive(self) -> None:
        if self._coming is not None:
            torch.cuda.current_stream(self._device).wait_event(self._coming)
            self._coming = None

    def __del__(self) -> None:
        # Memory that is still written to must not be given to others, say after a backward pass that failed.
        self._arrive()
        if self._on_host is not None:
            self._memory.give_back(self._on_host)


class _Saved:
    """What one block saved."""

    def __init__(self, memory: HostMemory, known: _Known, device: torch.device) -> None:
        self._memory = memory
        self._known = known
        self._device = device
        self._stored: list[weakref.ref[_Stored]] = []
        self._sent: torch.cuda.Event | None = None

    def pack(self, tensor: Tensor) -> _Kept | _Away:
        """Take what autograd saves. Weights stay where they are, and what is too small to be worth a copy."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        storage = tensor.untyped_storage()
        if is_weight or tensor.device != self._device or storage.nbytes() < SMALLEST:
            return _Kept(tensor)
        known = self._known.get(storage)
        stored = None if known is None else known()
        # One that was written to since is another one.
        if stored is None or stored.version != tensor._version:
            stored = _Stored(tensor, self._memory)
            self._known[storage] = weakref.ref(stored)
        self._stored.append(weakref.ref(stored))
        return _Away(stored, self, tensor)

    def send(self) -> None:
        """Begin to copy what is not yet on the host."""
        with self._memory.copying(self._device):
            for stored in self._alive():
                stored.send()
        self._sent = self._memory.copied()

    def let_go(self) -> None:
        """Free what was sent. The device waits for the copies, so that nothing is written over them."""
        if self._sent is not None:
            torch.cuda.current_stream(self._device).wait_event(self._sent)
        for stored in self._alive():
            stored.let_go()

    def fetch(self) -> None:
        """Begin to copy back what is no longer on the device."""
        if away := [stored for stored in self._alive() if stored.is_away]:
            for stored in away:
                stored.make_room()
            with self._memory.copying(self._device):
                for stored in away:
                    stored.fetch()
            coming = self._memory.copied()
            for stored in away:
                stored.expect(coming)

    def _alive(self) -> list[_Stored]:
        """Each once; what autograd has no more use for is gone."""
        return list({id(stored): stored for ref in self._stored if (stored := ref()) is not None}.values())


class _Kept:
    """A tensor that stays on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def tensor(self) -> Tensor:
        """As it was saved."""
        _refuse_modified(self._tensor._version != self._version)
        return self._tensor


class _Away:
    """A tensor whose storage goes to the host."""

    def __init__(self, stored: _Stored, saved: _Saved, tensor: Tensor) -> None:
        self._stored = stored
        self._saved = saved
        self._dtype = tensor.dtype
        self._layout = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        """As it was saved, fetched if it is not there."""
        if self._stored.is_away:
            self._saved.fetch()
        return self._stored.on_device().view(self._dtype).as_strided(*self._layout)


def _unpack(packed: _Kept | _Away) -> Tensor:
    return packed.tensor()


def _refuse_modified(is_modified: bool) -> None:
    """autograd's own check, which leaves tensors to those that hook into saving them."""
    if is_modified:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation, while "
            "memory.offload_activations kept it"
        )
