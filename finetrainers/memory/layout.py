"""Which tensors of a block are streamed, where each lies in the block's flat buffer, and what that comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RING = 2
"""Buffers on the device: one block runs, and the next one comes."""
_ALIGNMENT = 256
"""Bytes; what CUDA kernels want at most."""
_SMALL = 4096
"""Bytes of a buffer that stays on the device, such as a table of frequencies: a module may write into it."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a block in a flat buffer."""

    places: tuple[tuple[dict[str, Any], str], ...]
    """Where it stands: the parameters or buffers of modules, and its name there."""
    shape: torch.Size
    dtype: torch.dtype
    offset: int
    is_parameter: bool
    is_trained: bool

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        """The tensor that lies in a flat buffer of bytes."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def within(self, flat: Tensor) -> Tensor:
        """The same as what stands in the module."""
        view = self.view(flat)
        return nn.Parameter(view, requires_grad=self.is_trained) if self.is_parameter else view

    def put(self, tensor: Tensor) -> None:
        """Let the block have a tensor for this piece."""
        for tensors, name in self.places:
            tensors[name] = tensor

    def get(self) -> Tensor:
        """What the block has for it now."""
        tensors, name = self.places[0]
        tensor: Tensor = tensors[name]
        return tensor


@dataclass(frozen=True)
class Layout:
    """The pieces of one block, and the size of the flat buffer that takes them."""

    pieces: tuple[Piece, ...]
    nbytes: int


def lay_out(block: nn.Module, *, trained_too: bool) -> Layout:
    """A block's parameters and large buffers in a row. What is trained is an adapter that stays on the device, unless
    it is `trained_too`. Works on the meta device."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    tensors: dict[int, Tensor] = {}
    for part in block.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and _is_streamed(tensor, trained_too=trained_too):
                    places.setdefault(id(tensor), []).append((held, name))
                    tensors[id(tensor)] = tensor
    pieces, offset = [], 0
    for number, tensor in tensors.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        where = tuple(places[number])
        pieces.append(Piece(where, tensor.shape, tensor.dtype, offset, is_parameter, tensor.requires_grad))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return Layout(tuple(pieces), offset)


def _is_streamed(tensor: Tensor, *, trained_too: bool) -> bool:
    if not isinstance(tensor, nn.Parameter):
        return tensor.nbytes > _SMALL
    return trained_too or not tensor.requires_grad


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model of which some blocks are streamed."""

    host: int
    """Weights on the host, and their gradients where they are trained."""
    ring: int
    """Buffers on the device for blocks at work, and for their gradients where they are trained."""
    resident: int
    """Weights that stay on the device."""


def footprint(
    model: nn.Module, blocks: Sequence[nn.Module], *, trained_too: bool = False, ring: int = RING
) -> Footprint:
    """What a model comes to while `blocks` of it are streamed; on any device, the meta device as well, and before they
    are. Adapters count as resident, their gradients and all activations do not count."""
    layouts = [lay_out(block, trained_too=trained_too) for block in blocks]
    whole = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    streamed = {id(piece.get()) for layout in layouts for piece in layout.pieces}
    times = 1 + trained_too
    return Footprint(
        host=times * sum(layout.nbytes for layout in layouts),
        ring=times * sum(slot_sizes(layouts, ring)),
        resident=sum(nbytes for number, nbytes in whole.items() if number not in streamed),
    )


def slot_sizes(layouts: Sequence[Layout], ring: int) -> list[int]:
    """Bytes of each buffer of the ring: of the largest block that comes there, each in its turn."""
    return [max(layout.nbytes for layout in layouts[slot::ring]) for slot in range(min(ring, len(layouts)))]


def spread(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """So many of the blocks, evenly spread: a block that stays lends its time to the copy of the one behind it. The
    last is among them, because at the turn from forward to backward it is still there."""
    return [blocks[(number + 1) * len(blocks) // count - 1] for number in range(count)]
