"""What the device reaches at best: products of matrices, attention, and copies from and to the host's pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.runs import Run
from benchmarks.gpu.training import Bench
from finetrainers.engines.single import SingleEngine
from finetrainers.training.instruments import matmul_rate, median_seconds

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HEADS = 24
_BACKWARD = 2.5
"""Work of attention's backward pass over its forward pass, because scores are computed again."""


def measure_limits(run: Run, bench: Bench) -> None:
    """Rates in operations and in bytes a second, medians."""
    device = SingleEngine().device
    side, lengths, nbytes = (64, (32,), 2**16) if bench.is_tiny else (8192, (2688, 19968, 32760), 2**30)
    rate = matmul_rate(side, torch.bfloat16, device, warm_up=bench.warm_up, timed=bench.timed)
    bench.record.put(matmul_rate=rate)
    bench.record.put(
        attention={
            f"{name}, {length} tokens, head {width}": _attention(backend, (length, width), bench, device)
            for name, backend in BACKENDS.items()
            for length in lengths
            for width in (64, 128)
        }
    )
    bench.record.put(copies=_copies(nbytes, bench, device))


def _median_seconds(run: Callable[[], Any], bench: Bench, device: torch.device) -> float:
    return median_seconds(run, device, warm_up=bench.warm_up, timed=bench.timed)


def _attention(
    backend: SDPBackend, size: tuple[int, int], bench: Bench, device: torch.device
) -> dict[str, float] | str:
    """Rates forward, and forward and backward; or why the backend does not run."""
    length, width = size
    inputs = [
        torch.randn(1, HEADS, length, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    forward_flop = 4 * HEADS * length**2 * width

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*inputs)

    gradient = torch.randn_like(inputs[0])

    def both() -> None:
        torch.autograd.grad(forward(), inputs, gradient)

    try:
        seconds = _median_seconds(forward, bench, device), _median_seconds(both, bench, device)
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0]}"
    return {"forward": forward_flop / seconds[0], "both": (1 + _BACKWARD) * forward_flop / seconds[1]}


def _copies(nbytes: int, bench: Bench, device: torch.device) -> dict[str, float]:
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    ours = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return {
        "to_device": nbytes / _median_seconds(lambda: ours.copy_(host, non_blocking=True), bench, device),
        "to_host": nbytes / _median_seconds(lambda: host.copy_(ours, non_blocking=True), bench, device),
    }
