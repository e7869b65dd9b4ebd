"""Memory by phase, on the CPU of the test machine."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetrainers.memory.report import Held, MemoryReport, allocated_gib, held, peak_memory_gib
from finetrainers.training.callback import Callback
from finetrainers.training.memory import MemoryPhases
from tests.training.tiny_run import full, lora, make_batch, make_trainer

CPU = torch.device("cpu")
GIB = 2**30


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_memory_follows_what_is_held() -> None:
    before = allocated_gib(CPU)
    kept = torch.ones(2**26)  # 256 MiB, each page touched
    assert allocated_gib(CPU) - before == pytest.approx(0.25, abs=0.05)
    assert peak_memory_gib(CPU) >= allocated_gib(CPU) - 0.01
    peak = peak_memory_gib(CPU)
    del kept
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
    optimizer = SimpleNamespace(state={})
    trainer: Any = SimpleNamespace(device=CPU, models={"transformer": nn.Linear(2, 3)}, optimizer=optimizer)
    given: Any = None
    phases = MemoryPhases(MemoryReport(tmp_path / "memory.jsonl", CPU))
    phases.on_start(trainer)
    phases.on_validation(trainer, {}, {})
    for _ in range(3):
        phases.on_step_end(trainer, given)
    phases.on_validation(trainer, {}, {})
    phases.on_end(trainer)
    rows = rows_in(tmp_path / "memory.jsonl")
    names = [row["phase"] for row in rows]
    assert names == ["before training", "validation", "after the first step", "validation", "end"]
    assert all(row["weights_gib"] == 4 * 9 / GIB for row in rows)


def test_parts_by_hand() -> None:
    """Shared tensors count once, those elsewhere not at all, and gradients only where they are."""
    first, second = nn.Linear(10, 20), nn.Linear(10, 20)
    second.weight = first.weight
    second.register_buffer("table", torch.zeros(7, dtype=torch.float64))
    away = nn.Linear(50, 50, device="meta")
    first(torch.ones(1, 10)).sum().backward()
    optimizer = torch.optim.AdamW([first.weight])
    optimizer.step()
    parts = held([first, second, away], optimizer, CPU)
    assert parts.weights == 4 * (10 * 20 + 20 + 20) + 7 * 8
    assert parts.gradients == 4 * (10 * 20 + 20)
    assert parts.optimizer == 4 * (2 * 10 * 20 + 1), "two means and a step"
    assert parts.total == parts.weights + parts.gradients + parts.optimizer


def test_parts_are_told_where_they_are_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = MemoryReport(tmp_path / "memory.jsonl", CPU)
    report.phase("step", Held(weights=3 * GIB, optimizer=GIB // 2))
    (row,) = rows_in(tmp_path / "memory.jsonl")
    assert (row["weights_gib"], row["gradients_gib"], row["optimizer_gib"]) == (3.0, 0.0, 0.5)
    assert "GiB held, weights 3.00, optimizer 0.50, " in caplog.messages[0], "what is empty is not said"


@pytest.mark.parametrize("options", [lora(), full()], ids=["lora", "full"])
def test_the_rows_of_a_run_are_what_it_holds(folders: dict[str, Path], tmp_path: Path, options: Any) -> None:
    seen = []

    class Watch(Callback):
        def on_start(self, trainer: Any) -> None:
            seen.append(trainer.held())

        def on_step_end(self, trainer: Any, outcome: Any) -> None:
            seen.append(trainer.held())

    phases = MemoryPhases(MemoryReport(tmp_path / "memory.jsonl", CPU))
    batches = [make_batch([0]), make_batch([1])]
    trainer = make_trainer(folders["ltx-0.9.0"], batches, options=options, callbacks=[Watch(), phases], steps=1)
    trainer.fit()
    rows = rows_in(tmp_path / "memory.jsonl")[:2]
    assert [
        {name: row[f"{name}_gib"] * GIB for name in asdict(parts)} for row, parts in zip(rows, seen, strict=True)
    ] == [asdict(parts) for parts in seen]
    weights = sum(tensor.nbytes for tensor in trainer.models["transformer"].parameters())
    moments = 2 * sum(tensor.nbytes for tensor in trainer.trained.values()) + 4 * len(trainer.trained)
    assert seen[0].weights >= weights and (seen[0].optimizer, seen[1].optimizer) == (0, moments)


@pytest.mark.gpu
def test_on_a_device_each_phase_has_its_own_peak(tmp_path: Path) -> None:
    device = torch.device("cuda")
    report = MemoryReport(tmp_path / "memory.jsonl", device)
    report.phase("start")
    let_go = torch.empty(GIB // 4, device=device)
    del let_go
    report.phase("large")
    kept = torch.empty(GIB // 16, device=device)
    report.phase("small")
    del kept
    start, large, small = rows_in(tmp_path / "memory.jsonl")
    assert large["peak_gib"] - start["allocated_gib"] == pytest.approx(1, abs=0.01)
    assert small["peak_gib"] - start["allocated_gib"] == pytest.approx(0.25, abs=0.01)
    assert small["allocated_gib"] == small["peak_gib"]
    assert large["reserved_gib"] >= large["peak_gib"]
