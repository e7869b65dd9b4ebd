"""Gradients of streamed blocks on their way to the masters on the host, right after each block's backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from finetrainers.memory.lane import Arrival, Lane
from finetrainers.memory.layout import Layout


@dataclass(frozen=True)
class _Way:
    """One parameter's way home."""

    slot: int
    master: Tensor
    staged: Tensor
    """Its place in the ring, which bounds what the device holds however slow the host is."""
    home: Tensor
    """Its place on the host."""


class GradientsHome:
    """A ring of buffers on the device that gradients leave for the host from. What several passes of a step add up to
    lies on the host, and is fetched to be added to on the device, in the order of the passes, as autograd adds."""

    def __init__(self, ring: list[Tensor], to_device: Lane, to_host: Lane) -> None:
        self._ring = ring
        self._to_device, self._to_host = to_device, to_host
        self._homes: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._fetched: list[int | None] = [None] * len(ring)
        self._arrivals: list[Arrival] = [None] * len(ring)
        self._departures: list[Arrival] = [None] * len(ring)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held on the host and in the ring."""
        return sum(home.nbytes for home, _ in self._homes.values()), sum(buffer.nbytes for buffer in self._ring)

    def expect_from(
        self, number: int, layout: Layout, home: Tensor, masters: Sequence[Tensor], copies: Sequence[Tensor]
    ) -> None:
        """Take the gradients of one block from its parameters on the device, for its masters."""
        slot = number % len(self._ring)
        moving = [
            (piece, master, copy)
            for piece, master, copy in zip(layout.pieces, masters, copies, strict=True)
            if piece.is_trained
        ]
        for piece, master, copy in moving:
            way = _Way(slot, master, piece.view(self._ring[slot]), piece.view(home))
            copy.register_post_accumulate_grad_hook(partial(self._send, way))
        self._homes[number] = home, [master for _, master, _ in moving]

    def fetch(self, number: int) -> None:
        """Bring what earlier passes of the step gave a block, which is about to get more."""
        slot, (home, masters) = number % len(self._ring), self._homes[number]
        if self._fetched[slot] == number or all(master.grad is None for master in masters):
            return
        buffer = self._ring[slot][: len(home)]
        self._arrivals[slot] = self._to_device.copy(buffer, home, after=self._departures[slot])
        self._fetched[slot] = number

    def _send(self, way: _Way, copy: Tensor) -> None:
        assert copy.grad is not None
        self._to_host.wait(self._departures[way.slot])
        self._to_device.wait(self._arrivals[way.slot])
        if way.master.grad is None:
            way.staged.copy_(copy.grad)
        else:
            way.staged.add_(copy.grad)
        copy.grad = None
        self._fetched[way.slot] = None
        self._departures[way.slot] = self._to_host.copy(way.home, way.staged)
        way.master.grad = way.home
