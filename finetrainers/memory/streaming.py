"""Blocks whose weights lie in the host's memory and come to the device when they run, through a ring of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers.memory.gradients import GradientsHome
from finetrainers.memory.lane import Arrival, Lane
from finetrainers.memory.layout import RING, Layout, lay_out, slot_sizes

HOST = torch.device("cpu")


@dataclass
class _Parked:
    """A block whose weights lie on the host."""

    layout: Layout
    master: Tensor
    """All of them, flat."""
    on_host: list[Tensor]
    """As they stand in the block while it rests, a view of the master each."""
    on_device: list[Tensor] = field(default_factory=list)
    """As they stand in it while it runs, views of its buffer of the ring."""


class BlockStream:
    """Some blocks of one model, in the order in which they run. `park` each of them, move the rest of the model to the
    device, and `start`.

    A block's weights are copied to the device ahead of its turn, and found there when it runs: in the forward pass,
    and in the backward pass where activation checkpointing runs it again. Nothing is copied back, except gradients
    where the weights are trained (`trained_too`): parameters of a resting block are then the masters, to be given to
    an optimizer, and get their gradients on the host.

    Without checkpointing of whole blocks the backward pass would find other weights in the ring; torch notices, and
    raises an error.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        device: torch.device,
        host: torch.device = HOST,
        ring: int = RING,
        trained_too: bool = False,
    ) -> None:
        self.blocks = list(blocks)
        self._device = device
        self._host = host
        self._size = min(ring, len(self.blocks))
        self._trained_too = trained_too
        self._numbers = {id(block): number for number, block in enumerate(self.blocks)}
        self._parked: dict[int, _Parked] = {}
        self._to_device, self._to_host = Lane(device), Lane(device)
        self._ring: list[Tensor] = []
        self._owners: list[int | None] = [None] * self._size
        self._arrivals: list[Arrival] = [None] * self._size
        self._gradients: GradientsHome | None = None

    def park(self, block: nn.Module) -> None:
        """Take a block's weights, wherever they are, to the host."""
        layout = lay_out(block, trained_too=self._trained_too)
        master = self._to_device.host_buffer(layout.nbytes, self._host)
        parked = _Parked(layout, master, [piece.within(master) for piece in layout.pieces])
        for piece, tensor in zip(layout.pieces, parked.on_host, strict=True):
            piece.view(master).copy_(piece.get().detach())
            _mark(tensor)
        self._parked[self._numbers[id(block)]] = parked
        _bind(parked, parked.on_host)

    def start(self) -> None:
        """Stream from now on, once all blocks are parked."""
        parked = [self._parked[number] for number in range(len(self.blocks))]
        self._ring = self._buffers()
        for number, (block, each) in enumerate(zip(self.blocks, parked, strict=True)):
            each.on_device = [piece.within(self._ring[number % self._size]) for piece in each.layout.pieces]
            block.register_forward_pre_hook(partial(self._before, number))
            # What is saved is the master; what lies in the ring may be older.
            block.register_state_dict_pre_hook(partial(self._rest, number))
        if self._trained_too:
            self._gradients = GradientsHome(self._buffers(), self._to_device, self._to_host)
            for number, each in enumerate(parked):
                home = self._to_host.host_buffer(each.layout.nbytes, self._host)
                self._gradients.expect_from(number, each.layout, home, each.on_host, each.on_device)

    @property
    def loads(self) -> int:
        """Copies to the device so far, a block or its gradients each."""
        return self._to_device.count

    @property
    def returns(self) -> int:
        """Copies to the host so far, a tensor each."""
        return self._to_host.count

    @property
    def on_device(self) -> list[int | None]:
        """Numbers of the blocks in the ring, those on their way included."""
        return list(self._owners)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held on the host and in the ring."""
        host = sum(each.master.nbytes for each in self._parked.values())
        ring = sum(buffer.nbytes for buffer in self._ring)
        if self._gradients is not None:
            more_host, more_ring = self._gradients.nbytes
            host, ring = host + more_host, ring + more_ring
        return host, ring

    def _buffers(self) -> list[Tensor]:
        layouts = [self._parked[number].layout for number in range(len(self.blocks))]
        buffers = [torch.empty(n, dtype=torch.uint8, device=self._device) for n in slot_sizes(layouts, self._size)]
        return [self._to_host.share(self._to_device.share(buffer)) for buffer in buffers]

    def _before(self, number: int, block: nn.Module, args: Any) -> None:
        """A block is about to run: its weights must be there, and the next one's on their way."""
        # Of a pass that runs within the engine of autograd the order is the other way round.
        is_backward = torch._C._current_graph_task_id() != -1
        if self._trained_too and number == 0 and not is_backward:
            # An optimizer may have moved the masters; torch's fused ones do not count it as a change.
            self._owners = [None] * self._size
        self._load(number)
        self._to_device.wait(self._arrivals[number % self._size])
        _bind(self._parked[number], self._parked[number].on_device)
        following = self._following(number, is_backward=is_backward)
        for each in following:
            self._load(each)
        if self._gradients is not None and is_backward:
            for each in (number, *following):
                self._gradients.fetch(each)

    def _following(self, number: int, *, is_backward: bool) -> list[int]:
        """The blocks to run after one, as many as the ring takes beside it."""
        step = -1 if is_backward else 1
        following = [number + step * ahead for ahead in range(1, self._size)]
        if not torch.is_grad_enabled() and not self._trained_too and number == len(self.blocks) - 1:
            # Sampling and encoding begin again at the first, where its buffer is not the one at work.
            return [0] if number % self._size else []
        return [each for each in following if 0 <= each < len(self.blocks)]

    def _load(self, number: int) -> None:
        """Begin to copy a block into its buffer, unless it is there."""
        slot = number % self._size
        if self._owners[slot] == number:
            return
        if (old := self._owners[slot]) is not None:
            self._rest(old)
        master = self._parked[number].master
        self._arrivals[slot] = self._to_device.copy(self._ring[slot][: len(master)], master)
        self._owners[slot] = number

    def _rest(self, number: int, *hook_arguments: Any) -> None:
        """Let a block have its masters."""
        _bind(self._parked[number], self._parked[number].on_host)


def _bind(parked: _Parked, tensors: Sequence[Tensor]) -> None:
    for piece, tensor in zip(parked.layout.pieces, tensors, strict=True):
        piece.put(tensor)


def _mark(tensor: Any) -> None:
    tensor.is_parked = True


def is_parked(tensor: Tensor) -> bool:
    """Whether a tensor of a model lies on the host to be streamed, and is to stay there."""
    return hasattr(tensor, "is_parked")
