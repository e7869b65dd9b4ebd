"""The instruments, on a CPU; of a GPU's profile, what is made of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.training.instruments import Clock, covered, matmul_rate, median_seconds, profiled, spread

CPU = torch.device("cpu")


def test_times_are_between_marks():
    clock = Clock(CPU)
    for _ in range(4):
        clock.mark()
    assert len(clock.seconds()) == 3
    assert spread([1.0, 2.0, 3.0])["median"] == 2.0
    assert spread([float(n) for n in range(21)])["p95"] == 19.0


def test_only_timed_runs_are_timed():
    ran: list[int] = []
    assert median_seconds(lambda: ran.append(1), CPU, warm_up=2, timed=3) >= 0
    assert len(ran) == 5
    assert matmul_rate(32, torch.float32, CPU, warm_up=1, timed=3) > 0


@pytest.mark.parametrize(
    ("spans", "expected"),
    [([], 0), ([(0, 2), (3, 4)], 3), ([(3, 4), (0, 2)], 3), ([(0, 5), (1, 2), (4, 7)], 7), ([(0, 1), (1, 2)], 2)],
)
def test_overlapping_spans_cover_once(spans, expected):
    assert covered(spans) == expected


def event(name: str, start: float, end: float, *, device: str = "CUDA", annotates: bool = False) -> Any:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    kind = SimpleNamespace(name=device)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotates, time_range=span)


def test_a_profile_counts_kernels_alone(monkeypatch):
    events = [
        event("aten::mm", 0, 100, device="CPU"),
        event("gemm", 0, 40),
        event("gemm", 50, 90),
        event("copy", 80, 100),
        event("Optimizer.step#AdamW.step", 0, 500, annotates=True),
    ]

    class Profile:
        def __init__(self, **options: Any) -> None:
            pass

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def events(self) -> list[Any]:
            return events

    monkeypatch.setattr("torch.profiler.profile", Profile)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    stepped: list[int] = []
    profile = profiled(lambda: stepped.append(1), most=1)
    assert stepped == [1] and profile["kernels"] == 3
    assert profile["kernel_seconds"] == pytest.approx(100e-6)
    assert profile["busy_seconds"] == pytest.approx(90e-6)
    assert profile["longest"] == [{"name": "gemm", "count": 2, "seconds": pytest.approx(80e-6)}]
