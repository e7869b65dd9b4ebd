"""The rows of metrics.jsonl: exact, finite, a step late on a device, and one of each after a resume."""

import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.errors import RunError
from finetrainers.folder import RunFolder, read_rows
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.state import StepOutcome, TrainState

COLUMNS = ["step", "epoch", "loss", "grad_norm", "lr", "step_time", "data_time"]
COLUMNS += ["samples_per_s", "tokens_per_s", "memory_gib"]


def trainer_at(step: int, device: str = "cpu") -> Any:
    return SimpleNamespace(state=TrainState(step=step), steps=100, device=torch.device(device), callbacks=[])


def outcome(
    step: int, loss: float | torch.Tensor = 0.5, grad_norm: float | torch.Tensor = 1.0, **changes: Any
) -> StepOutcome:
    numbers: dict[str, Any] = {
        "step": step,
        "epoch": 2,
        "loss": torch.as_tensor(loss, dtype=torch.float32),
        "grad_norm": torch.as_tensor(grad_norm, dtype=torch.float32),
        "lr": 2e-4,
        "step_time": 0.25,
        "data_time": 0.05,
        "num_samples": 2,
        "num_tokens": 96,
    }
    return StepOutcome(**(numbers | changes))


def started(tmp_path: Path, trainer: Any, **arguments: Any) -> MetricsFile:
    metrics = MetricsFile(RunFolder(tmp_path), **arguments)
    metrics.on_start(trainer)
    return metrics


def rows_in(tmp_path: Path) -> list[dict[str, Any]]:
    return read_rows(RunFolder(tmp_path).metrics)


def test_a_row_holds_what_the_step_gave(tmp_path: Path) -> None:
    metrics = started(tmp_path, trainer_at(0))
    metrics.on_step_end(trainer_at(1), outcome(1))
    (row,) = rows_in(tmp_path)
    assert list(row) == COLUMNS
    assert row.pop("memory_gib") > 0.01
    # 2 samples and 96 tokens in a quarter of a second.
    expected = {"step": 1, "epoch": 2, "loss": 0.5, "grad_norm": 1.0, "lr": 2e-4, "step_time": 0.25, "data_time": 0.05}
    assert row == expected | {"samples_per_s": 8.0, "tokens_per_s": 384.0}


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(200, generator=generator) * 10 ** torch.linspace(-30, 30, 200)
    metrics = started(tmp_path, trainer_at(0))
    for step, loss in enumerate(losses, 1):
        metrics.on_step_end(trainer_at(step), outcome(step, loss, lr=1e-4 / step))
    rows = rows_in(tmp_path)
    assert torch.equal(torch.tensor([row["loss"] for row in rows], dtype=torch.float32), losses)
    assert [row["lr"] for row in rows] == [1e-4 / step for step in range(1, 201)]


@pytest.mark.parametrize("flush", ["on_validation", "on_checkpoint", "on_end", "close"])
def test_off_the_cpu_a_row_waits_for_the_next_step_or_a_flush(tmp_path: Path, flush: str) -> None:
    trainer = trainer_at(0, "cuda")
    metrics = started(tmp_path, trainer)
    metrics.on_step_end(trainer, outcome(1))
    assert rows_in(tmp_path) == []
    metrics.on_step_end(trainer, outcome(2))
    assert [row["step"] for row in rows_in(tmp_path)] == [1]
    arguments = {"close": (), "on_validation": (trainer, {}, {})}.get(flush, (trainer,))
    getattr(metrics, flush)(*arguments)
    assert [row["step"] for row in rows_in(tmp_path)] == [1, 2]


def test_on_the_cpu_a_row_is_written_at_once(tmp_path: Path) -> None:
    metrics = started(tmp_path, trainer_at(0))
    metrics.on_step_end(trainer_at(1), outcome(1))
    assert [row["step"] for row in rows_in(tmp_path)] == [1]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "validation_loss"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_not_finite_ends_the_run_before_a_checkpoint(
    tmp_path: Path, name: str, number: float, device: str
) -> None:
    trainer = trainer_at(12, device)
    metrics = started(tmp_path, trainer)
    with pytest.raises(RunError, match=rf"^{name} is {number} at step 12: .*optimizer\.lr"):
        if name == "validation_loss":
            metrics.on_validation(trainer, {name: number}, {})
        metrics.on_step_end(trainer, outcome(12, **{name: torch.tensor(number)}))
        metrics.on_checkpoint(trainer)
    metrics.close()
    assert rows_in(tmp_path) == []
    assert not metrics.has_validation(12)
    assert RunFolder(tmp_path).metrics.read_text() == ""


def test_closing_a_failed_run_does_not_hide_why_it_failed(tmp_path: Path) -> None:
    trainer = trainer_at(0, "cuda")
    metrics = started(tmp_path, trainer)
    metrics.on_step_end(trainer, outcome(1, float("nan")))
    metrics.close()
    metrics.close()
    MetricsFile(RunFolder(tmp_path)).close()


STEP, VALIDATION, TORN = "step", "validation", "torn"


@pytest.mark.parametrize(
    ("on_disk", "resumed_at", "kept", "validated"),
    [
        ([], 3, [], []),
        ([(STEP, 1), (STEP, 2)], 2, [(STEP, 1), (STEP, 2)], []),
        ([(STEP, 1), (STEP, 2), (STEP, 3)], 1, [(STEP, 1)], []),
        ([(STEP, 1), (STEP, 2), (TORN, 3)], 2, [(STEP, 1), (STEP, 2)], []),
        (
            [(VALIDATION, 0), (STEP, 1), (STEP, 2), (VALIDATION, 2), (STEP, 3), (VALIDATION, 4)],
            2,
            [(VALIDATION, 0), (STEP, 1), (STEP, 2), (VALIDATION, 2)],
            [0, 2],
        ),
        ([(VALIDATION, 0), (STEP, 1)], 0, [], []),
    ],
)
def test_after_a_resume_there_is_one_row_per_step(
    tmp_path: Path, on_disk: list, resumed_at: int, kept: list, validated: list[int]
) -> None:
    path = RunFolder(tmp_path).metrics
    path.write_text("".join(line(*row) for row in on_disk))
    metrics = started(tmp_path, trainer_at(resumed_at))
    assert path.read_text() == "".join(line(*row) for row in kept)
    assert [step for step in range(6) if metrics.has_validation(step)] == validated
    metrics.on_step_end(trainer_at(resumed_at + 1), outcome(resumed_at + 1))
    steps = [row["step"] for row in rows_in(tmp_path) if "loss" in row]
    assert steps == [step for kind, step in kept if kind == STEP] + [resumed_at + 1]


def line(kind: str, step: int) -> str:
    name = "validation_loss" if kind == VALIDATION else "loss"
    text = json.dumps({"step": step, name: 1 / 3}) + "\n"
    return text[:-9] if kind == TORN else text


def test_listeners_get_the_rows_that_are_written_in_their_order(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    trainer = trainer_at(1, "cuda")
    metrics = started(tmp_path, trainer, listeners=[heard.append])
    metrics.on_step_end(trainer, outcome(1))
    metrics.on_validation(trainer, {"validation_loss": 0.25}, {})
    metrics.on_validation(trainer, {}, {"a cat": tmp_path / "a.mp4"})
    assert heard == rows_in(tmp_path)
    assert [list(row)[-1] for row in heard] == ["memory_reserved_gib", "validation_loss"]
    assert metrics.has_validation(1)


def test_a_step_is_cheap(tmp_path: Path) -> None:
    trainer = trainer_at(0)
    metrics = started(tmp_path, trainer)
    seconds = []
    for step in range(1, 400):
        given = outcome(step)
        begun = time.perf_counter()
        metrics.on_step_end(trainer, given)
        seconds.append(time.perf_counter() - begun)
    # Measured: 12 us. Ten times that says that something waits or is written twice.
    assert statistics.median(seconds) < 120e-6


@pytest.mark.gpu
def test_reading_a_step_late_does_not_wait_for_the_device(tmp_path: Path) -> None:
    trainer = trainer_at(0, "cuda")
    metrics = started(tmp_path, trainer)
    work = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    seconds, expected = [], []
    for step in range(1, 6):
        for _ in range(20):
            torch.mm(work, work, out=torch.empty_like(work))
        loss = torch.full((), 0.1 * step, device="cuda")
        begun = time.perf_counter()
        metrics.on_step_end(trainer, outcome(step, loss))
        seconds.append(time.perf_counter() - begun)
        expected.append(torch.tensor(0.1 * step).item())
    assert not torch.cuda.current_stream().query(), "the device still works on the last step"
    metrics.on_end(trainer)
    assert [row["loss"] for row in rows_in(tmp_path)] == expected


@pytest.mark.gpu
def test_on_a_device_a_row_has_what_the_allocator_keeps(tmp_path: Path) -> None:
    trainer = trainer_at(0, "cuda")
    metrics = started(tmp_path, trainer)
    before = torch.cuda.memory_reserved() / 2**30
    let_go = torch.empty(2**28, device="cuda")
    del let_go
    metrics.on_step_end(trainer, outcome(1))
    metrics.on_end(trainer)
    (row,) = rows_in(tmp_path)
    assert list(row) == [*COLUMNS, "memory_reserved_gib"]
    assert row["memory_reserved_gib"] >= max(before, row["memory_gib"]) and row["memory_reserved_gib"] >= 1
