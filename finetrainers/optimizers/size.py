"""How many bytes an optimizer's state takes, in plain integers, before there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod

SMALLEST_MOVED = 64 * 1024
"""Bytes from which a tensor of the state goes to the host's memory; a transfer of less takes as long as one of this."""

ALIGNMENT = 256
"""Bytes; that of a tensor with memory of its own, since kernels go by it."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateBytes:
    """Where the state lies, from the first step on."""

    device: int
    host: int
    """Of paged optimizers, what may lie there."""
    update: int
    """On the device besides, while tensors are updated: room for the states of two, one on its way and one in use, and
    for the fp32 copies of the largest tensor where weights are bf16. What an optimizer's own arithmetic needs comes on
    top: nothing for AdamW."""


def state_bytes(
    name: str,
    shapes: Iterable[Shape],
    *,
    offload: bool = False,
    bf16_weights: bool = False,
    zeros: Collection[Shape] = (),
) -> StateBytes:
    """The state of the optimizer of a name for trained tensors of these shapes. It does not depend on the weights'
    type, because updates are computed in fp32.

    `zeros` are those of the shapes whose tensors are zero when training begins, such as half of a LoRA, of which
    prodigy keeps less.
    """
    shapes, zero = list(shapes), Counter(zeros)
    device, host, largest = _shared(name, shapes), 0, 0
    for shape in shapes:
        parts = _parts(name, shape, is_zero=zero[shape] > 0)
        zero[shape] -= 1
        moved = sum(part for part in parts if offload and part >= SMALLEST_MOVED)
        paged = 2 * prod(shape) if name == "paged_adamw_8bit" and prod(shape) >= _PAGED_FROM else 0
        device += sum(parts) - max(moved, paged)
        host += max(moved, paged)
        largest = max(largest, sum(aligned(part) for part in parts if offload and part >= SMALLEST_MOVED))
    copies = _BYTES_TO_ROUND * max((prod(shape) for shape in shapes), default=0) if bf16_weights else 0
    return StateBytes(device, host, 2 * largest + copies)


def aligned(num_bytes: int) -> int:
    """Bytes that lie before the next tensor where several share their memory."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


_PAGED_FROM = 100_000
_QUANTIZED_FROM = 4096
_BYTES_TO_ROUND = 4 + 4 + 4
"""Of each number: the weight, its gradient, and once that is gone what is drawn to round it."""


def _parts(name: str, shape: Shape, *, is_zero: bool) -> list[int]:
    """Bytes of each tensor that is kept for a trained tensor of this shape."""
    count, step = prod(shape), 4
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        if count < _QUANTIZED_FROM:
            return [4 * count, 4 * count]
        scales = 4 * -(-count // 256)
        return [count, count, scales, scales]
    if name in ("torchao_adamw_8bit", "torchao_adamw_4bit"):
        bits, block = (8, 256) if name == "torchao_adamw_8bit" else (4, 128)
        if count < _QUANTIZED_FROM or count % block:
            return [4 * count, 4 * count, step]
        # Codes, a scale for each block, and what the codes stand for.
        return 2 * [count * bits // 8, 4 * count // block, 4 * 2**bits] + [step]
    if name == "adafactor":
        if len(shape) < 2:
            return [4 * count, step]
        return [4 * count // shape[-1], 4 * count // shape[-2], step]
    if name == "prodigy":
        return [4 * count, 4 if is_zero else 4 * count, 4 * count, 4 * count]
    if name == "muon" and len(shape) == 2:
        return [4 * count]
    return [4 * count, 4 * count, step]


def _shared(name: str, shapes: Iterable[Shape]) -> int:
    """Bytes that all tensors share: what the codes of 8-bit states stand for."""
    quantizes = name in ("adamw_8bit", "paged_adamw_8bit") and any(prod(shape) >= _QUANTIZED_FROM for shape in shapes)
    return 2 * 4 * 256 if quantizes else 0
