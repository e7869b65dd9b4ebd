"""Memory by phase, on the CPU of the test machine."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.memory.report import MemoryReport, allocated_gib, peak_memory_gib
from finetrainers.training.memory import MemoryPhases

CPU = torch.device("cpu")
GIB = 2**30


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_memory_follows_what_is_held() -> None:
    before = allocated_gib(CPU)
    held = torch.ones(2**26)  # 256 MiB, each page touched
    assert allocated_gib(CPU) - before == pytest.approx(0.25, abs=0.05)
    assert peak_memory_gib(CPU) >= allocated_gib(CPU) - 0.01
    peak = peak_memory_gib(CPU)
    del held
    assert allocated_gib(CPU) - before == pytest.approx(0, abs=0.05)
    assert peak_memory_gib(CPU) == pytest.approx(peak, abs=0.01)


def test_a_phase_is_a_row_and_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "not yet" / "memory.jsonl"
    report = MemoryReport(path, CPU)
    report.phase("start")
    report.phase("after encoding")
    first, second = rows_in(path)
    assert (first["phase"], second["phase"]) == ("start", "after encoding")
    assert list(first) == ["phase", "allocated_gib", "peak_gib", "seconds"]
    assert 0 <= first["seconds"] <= second["seconds"] < 5
    assert [message.split(":")[0] for message in caplog.messages] == ["Memory, start", "Memory, after encoding"]
    MemoryReport(path, CPU).phase("start")
    assert len(rows_in(path)) == 3


def test_the_phases_of_training(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(device=CPU)
    given: Any = None
    phases = MemoryPhases(MemoryReport(tmp_path / "memory.jsonl", CPU))
    phases.on_start(trainer)
    phases.on_validation(trainer, {}, {})
    for _ in range(3):
        phases.on_step_end(trainer, given)
    phases.on_validation(trainer, {}, {})
    phases.on_end(trainer)
    names = [row["phase"] for row in rows_in(tmp_path / "memory.jsonl")]
    assert names == ["before training", "validation", "after the first step", "validation", "end"]


@pytest.mark.gpu
def test_on_a_device_each_phase_has_its_own_peak(tmp_path: Path) -> None:
    device = torch.device("cuda")
    report = MemoryReport(tmp_path / "memory.jsonl", device)
    report.phase("start")
    held = torch.empty(GIB // 4, device=device)
    del held
    report.phase("large")
    kept = torch.empty(GIB // 16, device=device)
    report.phase("small")
    del kept
    start, large, small = rows_in(tmp_path / "memory.jsonl")
    assert large["peak_gib"] - start["allocated_gib"] == pytest.approx(1, abs=0.01)
    assert small["peak_gib"] - start["allocated_gib"] == pytest.approx(0.25, abs=0.01)
    assert small["allocated_gib"] == small["peak_gib"]
    assert large["reserved_gib"] >= large["peak_gib"]
