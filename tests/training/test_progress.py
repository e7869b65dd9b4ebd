"""What the progress lines show, where they write, and that they cost a step nothing."""

import io
import itertools
import logging
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.training import progress
from finetrainers.training.progress import ProgressLine, phase_progress
from finetrainers.training.state import TrainState


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for the `time` module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress, "time", self)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest puts its own stderr in place between a test's setup and its call."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return terminal


def trainer_of(steps: int, *, done: int = 0) -> Any:
    return SimpleNamespace(state=TrainState(step=done), steps=steps, device=torch.device("cpu"), callbacks=[])


def row(step: int, *, loss: float = 0.5, step_time: float = 0.5) -> dict[str, Any]:
    return {"step": step, "epoch": 3, "loss": loss, "step_time": step_time, "memory_gib": 11.25}


def run(line: ProgressLine, clock: Clock, *, steps: int, step_time: float, done: int = 0) -> None:
    line.on_start(trainer_of(steps, done=done))
    for step in range(done + 1, steps + 1):
        clock.now += step_time
        line.on_row(row(step, step_time=step_time))
    line.on_end(trainer_of(steps))
    line.close()


@pytest.mark.parametrize(
    ("steps", "done", "step_time", "logged"),
    [
        # Every twentieth of the run, where that is 10 seconds or more.
        (100, 0, 2.0, [*range(5, 101, 5)]),
        # 1000 steps of 10 ms take 10 seconds: only the end is worth a line.
        (1000, 0, 0.01, [1000]),
        # Steps of 2 minutes: a line at least each 5 minutes, so each third step.
        (100, 90, 120.0, [93, 96, 99, 100]),
        (3, 0, 0.1, [3]),
        (3, 3, 0.1, []),
    ],
)
def test_elsewhere_than_on_a_terminal_it_logs_now_and_then(
    clock: Clock, caplog: pytest.LogCaptureFixture, steps: int, done: int, step_time: float, logged: list[int]
) -> None:
    caplog.set_level(logging.INFO)
    run(ProgressLine(), clock, steps=steps, step_time=step_time, done=done)
    assert [message.split()[1] for message in caplog.messages] == [f"{step}/{steps}" for step in logged]


def test_a_line_says_how_far_how_well_and_how_long(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = ProgressLine()
    line.on_start(trainer_of(1000, done=199))
    for step, step_time in [(200, 4.0), (201, 4.0), (202, 16.0)]:
        clock.now += step_time
        line.on_row(row(step, loss=0.25, step_time=step_time))
    line.on_row({"step": 202, "validation_loss": 9.0})
    line.on_end(trainer_of(1000))
    # 798 steps at a mean of 8 s are 6384 s; the usual step takes 4 s.
    assert caplog.messages == ["Training 202/1000  loss 0.2500  4.0 s/it  1:46:24 left  peak 11.2 GiB  epoch 3"]


def test_the_loss_is_smoothed_without_a_bias_at_the_start(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = ProgressLine()
    line.on_start(trainer_of(2))
    line.on_row(row(1, loss=1.0))
    line.on_row(row(2, loss=2.0))
    # (0.95 * 1 + 2) / (0.95 + 1) = 1.51282
    assert "loss 1.5128" in caplog.messages[-1]


def test_on_a_terminal_it_redraws_at_most_four_times_a_second(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = as_terminal(monkeypatch)
    line = ProgressLine()
    line.on_start(trainer_of(10_000))
    sizes = []
    for step in range(1, 1001):
        clock.now += 0.01
        line.on_row(row(step, step_time=0.01))
        sizes.append(len(terminal.getvalue()))
    redraws = sum(before != after for before, after in itertools.pairwise(sizes))
    assert 36 <= redraws <= 40
    line.on_end(trainer_of(10_000))
    line.close()
    shown = terminal.getvalue()
    assert "Training" in shown and "1000/10000  loss 0.5000  100.0 it/s  1:30 left" in shown
    assert capsys.readouterr().out == ""


def test_a_step_is_cheap_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)
    line = ProgressLine()
    line.on_start(trainer_of(100_000))
    seconds = []
    for step in range(1, 3000):
        given = row(step)
        begun = time.perf_counter()
        line.on_row(given)
        seconds.append(time.perf_counter() - begun)
    line.close()
    assert "/100000" in terminal.getvalue()
    # Measured: 1 us.
    assert statistics.median(seconds) < 50e-6


def test_a_phase_counts_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)
    with phase_progress("encoding [videos]", 4) as phase:
        clock.now += 2.0
        phase.advance()
        assert "encoding [videos]" in terminal.getvalue()
        assert "1/4  0.5/s  0:06 left" in terminal.getvalue()
        phase.advance(3)
    assert "4/4  2.0/s  0:00 left" in terminal.getvalue()


def test_a_phase_logs_elsewhere_and_says_where_it_stopped(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with phase_progress("nothing to do", 0):
        pass
    with pytest.raises(KeyError), phase_progress("encoding texts", 100) as phase:
        for _ in range(15):
            clock.now += 2.0
            phase.advance(2)
        raise KeyError
    # Each 5th is worth a line, 10 seconds apart: after 5 calls of 2, and at the failure.
    assert [message.split("  ")[0] for message in caplog.messages] == [
        f"encoding texts {done}/100" for done in (10, 20, 30)
    ]
