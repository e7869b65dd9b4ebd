"""Batches on their way to a GPU, on a stream of their own, while it works on others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetrainers.types import Batch


class Transfer:
    """To one device; on any other than CUDA's a batch stays as it is, and there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare(self, batch: Batch) -> Batch:
        """What takes the host a while, and is done in a thread: the batch in memory that the device reads by itself."""
        return batch if self._stream is None else batch.map(Tensor.pin_memory)

    def send(self, batch: Batch) -> Callable[[], Batch]:
        """Begin to copy a prepared batch. What is returned gives it, and lets what the device is told from then on wait
        for it; the host never does."""
        if self._stream is None:
            return lambda: batch
        with torch.cuda.stream(self._stream):
            there = batch.map(lambda tensor: tensor.to(self._device, non_blocking=True))
            arrival = self._stream.record_event()

        def receive() -> Batch:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrival)
            # Its memory is the other stream's, and must not be given away before this one is through with it.
            for tensor in there.tensors:
                tensor.record_stream(stream)
            return there

        return receive
