"""Passes recorded as CUDA graphs: where a size of batch comes back its pass is launched at once, rather than kernel by
kernel, which takes the host longer than small kernels take the GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers.types import Batch

logger = logging.getLogger(__name__)

Pass = Callable[[Batch, int], Tensor]
"""The forward and backward pass of a batch, in a step of so many samples: its share of the loss, fp32 scalar. Gradients
are added to those of the parameters."""
Run = Callable[[], None]
Recorder = Callable[[Run], Run]
"""Records what a program would launch, and launches nothing; what is returned launches it, as often as it is called,
and reads and writes the memory that was recorded."""


class CudaGraphs:
    """A Recorder on a GPU. What its recordings hold while they run lies in one pool, since they run in turn."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        # Threads that read batches go on meanwhile, and may do what this one may not.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class RecordedPasses:
    """A Pass. The first of each size runs as it is, and compiles and tunes what it needs; when the size comes back it
    is recorded, and from then on replayed. Every number is that of the pass itself.

    A pass that is recorded must launch the same kernels whatever the numbers of its batch are, take nothing from the
    host but the batch, and leave nothing on the device but gradients. They add up in buffers that stay, which become
    the gradients of the parameters in each step anew.
    """

    def __init__(self, run: Pass, recorder: Recorder, parameters: Sequence[nn.Parameter]) -> None:
        self._run = run
        self._recorder = recorder
        self._parameters = parameters
        self._moved: dict[Hashable, list[nn.Parameter]] = {}
        """By size, the parameters that a pass gives gradients."""
        self._recordings: dict[Hashable, _Recording] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def __call__(self, batch: Batch, num_samples: int) -> Tensor:
        size = _size(batch, num_samples)
        if size not in self._moved:
            self._moved[size], share = self._run_and_watch(batch, num_samples)
            return share
        self._gather_in_buffers(self._moved[size])
        if size not in self._recordings:
            self._recordings[size] = self._record(batch, num_samples)
        return self._recordings[size].replay(batch)

    def _run_and_watch(self, batch: Batch, num_samples: int) -> tuple[list[nn.Parameter], Tensor]:
        moved: list[Any] = []
        hooks = [parameter.register_post_accumulate_grad_hook(moved.append) for parameter in self._parameters]
        try:
            return moved, self._run(batch, num_samples)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _gather_in_buffers(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let each parameter's gradient be its buffer, with what earlier passes of the step gave."""
        fresh = []
        for parameter in parameters:
            if (buffer := self._gradients.get(parameter)) is None:
                buffer = self._gradients[parameter] = torch.empty_like(parameter)
            if parameter.grad is None:
                fresh.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)

    def _record(self, batch: Batch, num_samples: int) -> _Recording:
        begun = time.perf_counter()
        given = batch.map(Tensor.clone)
        share = torch.zeros((), device=batch.level_B.device)

        def run() -> None:
            share.copy_(self._run(given, num_samples))

        launch = self._recorder(run)
        seconds = time.perf_counter() - begun
        logger.info("recorded the pass of a size, number %d: %.1f s", len(self._recordings) + 1, seconds)
        return _Recording(launch, given, share)


@dataclass(frozen=True)
class _Recording:
    launch: Run
    given: Batch
    """Where it reads its batch."""
    share: Tensor
    """Where it writes its share of the loss."""

    def replay(self, batch: Batch) -> Tensor:
        torch._foreach_copy_(self.given.tensors, batch.tensors)
        self.launch()
        return self.share.clone()


def _size(batch: Batch, num_samples: int) -> Hashable:
    """All of a batch that decides what its pass launches, and every number that a pass takes from the host."""
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in batch.tensors)
    return shapes, tuple(batch.text), tuple(batch.given), num_samples
