"""Copies between host and device that run beside the device's work, on a CUDA stream of their own."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from finetrainers.errors import UserError

_GIB = 2**30
_PAGE = 4096
Arrival = torch.cuda.Event | None
"""When a copy is through; None says that it is."""


class Lane:
    """One direction. A copy reads and writes after all that the device was given to do before it; who uses what it
    brings lets the device wait for it, never the host. On any other device than CUDA's it is a plain copy."""

    def __init__(self, device: torch.device) -> None:
        # Tensors of a simulation (FakeTensorMode) say that they lie on a CUDA device, and there is nothing there.
        is_real = type(torch.empty(0, device=device)) is Tensor
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and is_real else None
        self._pinned: list[Tensor] = []
        self.count = 0
        """Copies so far."""
        weakref.finalize(self, _unpin, self._stream, self._pinned).atexit = False

    def copy(self, target: Tensor, source: Tensor, *, after: Arrival = None) -> Arrival:
        """Begin a copy, which waits for another one as well if one is given."""
        self.count += 1
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, arrival: Arrival) -> None:
        """Let what the device is given from now on wait for a copy."""
        if self._stream is not None and arrival is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(arrival)

    def share(self, buffer: Tensor) -> Tensor:
        """A buffer on the device that this lane copies to or from: when it is let go, its memory is given to another
        only once the lane is through with it."""
        if self._stream is not None:
            buffer.record_stream(self._stream)
        return buffer

    def host_buffer(self, nbytes: int, host: torch.device) -> Tensor:
        """So many bytes on the host, which the device reads and writes by itself; pinned as long as the lane lives."""
        if self._stream is None:
            return torch.empty(nbytes, dtype=torch.uint8, device=host)
        # Whole pages, which no other buffer shares. torch's own allocator of pinned memory rounds up to a power of two,
        # which of a block of 0.6 GiB is 1 GiB.
        whole = -(-nbytes // _PAGE) * _PAGE
        around = torch.empty(whole + _PAGE, dtype=torch.uint8, device=host)
        pages = around[-around.data_ptr() % _PAGE :][:whole]
        failed = int(torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), whole, 0))
        if failed:
            raise UserError(
                f"the host cannot pin {whole / _GIB:.2f} GiB of its memory (CUDA error {failed}): stream fewer blocks "
                "(memory.stream_blocks), or raise the limit of locked memory (ulimit -l)"
            )
        self._pinned.append(pages)
        return pages[:nbytes]


def _unpin(stream: torch.cuda.Stream | None, buffers: list[Tensor]) -> None:
    if stream is not None:
        stream.synchronize()
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
    buffers.clear()
