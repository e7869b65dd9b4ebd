"""Optimizer states in the host's memory, each brought to the device while its tensor is updated."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetrainers.optimizers.size import SMALLEST_MOVED, aligned

State = dict[str, Any]
"""What an optimizer keeps for one tensor: plain tensors and numbers, by name."""

_LARGEST_SLAB = 1 << 30


class HostStates:
    """Keeps the large tensors of states in pinned host memory. On CUDA the next tensor's state comes in and the last
    one's goes out while one is updated: two slots on the device, a stream for each way, and events between them, so
    that nothing waits on the host. Which tensor is next is what it was the last time; a wrong guess costs time alone.
    """

    def __init__(self, device: torch.device, states: MutableMapping[Tensor, State]) -> None:
        self._device = device
        self._states = states
        on_gpu = device.type == "cuda"
        self._inward = torch.cuda.Stream(device) if on_gpu else None
        self._outward = torch.cuda.Stream(device) if on_gpu else None
        self._slabs = Slabs(pinned=on_gpu)
        self._slots = [_Slot(), _Slot()]
        self._written: dict[Tensor, torch.cuda.Event | None] = {}
        self._next: dict[Tensor, Tensor] = {}
        self._last: Tensor | None = None
        self._largest = 0

    def adopt(self, owner: Tensor, state: State) -> None:
        """Take a whole state over, wherever its large tensors lie. Waits for the device: for first steps and
        resumptions."""
        kept = {}
        for name, value in state.items():
            if is_large(value):
                kept[name] = self._slabs.take(value.nbytes).view(value.dtype).view(value.shape)
                kept[name].copy_(value)
            else:
                kept[name] = value
        self._states[owner] = kept
        self._largest = max(self._largest, _room(kept))
        for slot in self._slots:
            slot.owner = None

    def bring(self, owner: Tensor) -> State:
        """The state of a tensor on the device, to be updated there; then `store` takes it back."""
        if self._last is not None:
            self._next[self._last] = owner
        self._last = owner
        slot = next((slot for slot in self._slots if slot.owner is owner), None)
        if slot is None:
            slot = self._slots[0]
            self._load(slot, owner)
        follower = self._next.get(owner)
        other = self._slots[1] if slot is self._slots[0] else self._slots[0]
        if follower is not None and follower is not owner and other.owner is not follower:
            self._load(other, follower)
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        return slot.state

    def store(self, owner: Tensor, state: State) -> None:
        """Send what `bring` gave back to the host, as it is now."""
        slot = next(slot for slot in self._slots if slot.owner is owner)
        kept = self._states[owner]
        pairs = []
        for name, value in state.items():
            if is_large(value):
                assert value is slot.state[name], f"{name} was replaced, not updated in place"
                pairs.append((kept[name], value))
            else:
                kept[name] = value
        updated = None if self._outward is None else torch.cuda.current_stream(self._device).record_event()
        slot.emptied = self._written[owner] = _copy(self._outward, pairs, after=[updated])
        slot.owner = None

    def settle(self) -> None:
        """Wait until all that was sent to the host is there."""
        if self._outward is not None:
            self._outward.synchronize()

    def _load(self, slot: _Slot, owner: Tensor) -> None:
        if slot.buffer is None or slot.buffer.numel() < _room(self._states[owner]):
            self._widen(slot)
        kept, offset, pairs = self._states[owner], 0, []
        slot.state = dict(kept)
        for name, value in kept.items():
            if is_large(value):
                assert slot.buffer is not None
                place = slot.buffer[offset : offset + value.nbytes].view(value.dtype).view(value.shape)
                slot.state[name] = place
                pairs.append((place, value))
                offset += aligned(value.nbytes)
        slot.filled = _copy(self._inward, pairs, after=[slot.emptied, self._written.get(owner)])
        slot.owner = owner

    def _widen(self, slot: _Slot) -> None:
        if self._inward is not None:
            # The old buffer may be in use still on either stream, and the new one's memory on the current one.
            torch.cuda.synchronize(self._device)
        slot.buffer = torch.empty(self._largest, dtype=torch.uint8, device=self._device)


class Slabs:
    """Host memory cut from large pieces: pinned memory comes in powers of two, which a tensor alone would waste up to
    half of."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._open: list[tuple[Tensor, int]] = []
        self._total = 0

    def take(self, num_bytes: int) -> Tensor:
        """So many bytes that nobody else has."""
        for number, (slab, used) in enumerate(self._open):
            if used + num_bytes <= slab.numel():
                self._open[number] = slab, used + aligned(num_bytes)
                return slab[used : used + num_bytes]
        # As much again as there is, up to a limit.
        size = max(num_bytes, min(self._total, _LARGEST_SLAB))
        slab = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8, pin_memory=self._pinned)
        self._total += slab.numel()
        self._open.append((slab, aligned(num_bytes)))
        return slab[:num_bytes]


@dataclass
class _Slot:
    """Room on the device for the state of one tensor."""

    buffer: Tensor | None = None
    owner: Tensor | None = None
    """The tensor whose state lies in it or is on its way."""
    state: State = field(default_factory=dict)
    filled: torch.cuda.Event | None = None
    emptied: torch.cuda.Event | None = None


def _copy(
    stream: torch.cuda.Stream | None, pairs: list[tuple[Tensor, Tensor]], *, after: list[torch.cuda.Event | None]
) -> torch.cuda.Event | None:
    """Copy the second of each pair into the first, on a stream of its own once the events are through, or now where
    there are no streams."""
    if stream is None:
        for target, source in pairs:
            target.copy_(source)
        return None
    for event in after:
        if event is not None:
            stream.wait_event(event)
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return stream.record_event()


def is_large(value: Any) -> bool:
    """Whether this part of a state is worth a place on the host."""
    return isinstance(value, Tensor) and value.nbytes >= SMALLEST_MOVED


def _room(state: State) -> int:
    return sum(aligned(value.nbytes) for value in state.values() if is_large(value))
