"""Shows how far a run is, on stderr: one live line on a terminal, a plain log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from finetrainers.training.callback import Callback

if TYPE_CHECKING:
    from finetrainers.training.trainer import Trainer

logger = logging.getLogger(__name__)

_REDRAW_SECONDS = 0.25
_LOG_SECONDS = (10.0, 300.0)
"""Plain lines come at least and at most this far apart."""


class ProgressLine(Callback):
    """Shows step, smoothed loss, speed, time left, peak memory and epoch.

    It reads no tensor: give `on_row` to `MetricsFile` as a listener, whose rows are numbers already. On a CUDA device
    they come a step late, and so does the line.
    """

    def __init__(self) -> None:
        self._loss = _Smoothed(0.95)
        self._step_times: deque[float] = deque(maxlen=20)
        self._elapsed = 0.0
        self._steps = 0
        self._line: _Line | None = None
        self._row: dict[str, Any] | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._line = _Line("Training", total=trainer.steps, done=trainer.state.step)

    def on_row(self, row: dict[str, Any]) -> None:
        """Take a row of `metrics.jsonl`; validations are passed over."""
        if "loss" not in row or self._line is None:
            return
        self._row = row
        self._loss.add(row["loss"])
        self._step_times.append(row["step_time"])
        self._elapsed += row["step_time"]
        self._steps += 1
        if self._line.is_due(row["step"]):
            self._draw(row)

    def on_end(self, trainer: Trainer) -> None:
        if self._row is not None and self._line is not None and self._line.shown != self._row["step"]:
            self._draw(self._row)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _draw(self, row: dict[str, Any]) -> None:
        assert self._line is not None
        # The mean has its share of validations and checkpoints, the median has not.
        left = (self._line.total - row["step"]) * self._elapsed / self._steps
        self._line.draw(
            row["step"],
            f"loss {self._loss.value:.4f}",
            _speed_text(median(self._step_times)),
            f"{_duration_text(left)} left",
            f"peak {row['memory_gib']:.1f} GiB",
            f"epoch {row['epoch']}",
        )


class Phase:
    """Counts what a phase before training has done, such as clips encoded."""

    def __init__(self, title: str, total: int) -> None:
        self._line = _Line(title, total=total, done=0)
        self._begun = time.monotonic()
        self._done = 0

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        self._done += n
        if self._done != self._line.shown and self._line.is_due(self._done):
            self._draw()

    def close(self) -> None:
        """Show the last count and leave the line."""
        if self._done and self._line.shown != self._done:
            self._draw()
        self._line.close()

    def _draw(self) -> None:
        elapsed = time.monotonic() - self._begun
        speed = f"{self._done / max(elapsed, 1e-9):.1f}/s"
        left = elapsed * (self._line.total - self._done) / self._done
        self._line.draw(self._done, speed, f"{_duration_text(left)} left")


@contextmanager
def phase_progress(title: str, total: int) -> Iterator[Phase]:
    """Show `title done/total` with speed and time left while the block runs; it calls `advance` as it goes."""
    phase = Phase(title, total)
    try:
        yield phase
    finally:
        phase.close()


class _Line:
    """One line of progress: redrawn in place on a terminal, logged anew elsewhere."""

    def __init__(self, title: str, *, total: int, done: int) -> None:
        self.title = title
        self.total = total
        self.shown: int | None = None
        """The count that was drawn last."""
        self._last = done
        self._drawn_at = time.monotonic()
        self._every = max(1, total // 20)
        self._live: Progress | None = None
        console = Console(stderr=True)
        # Of several processes on one terminal only the main one draws; the others' log is silent.
        if console.is_terminal and logger.isEnabledFor(logging.WARNING):
            columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}")]
            # Without rich's own thread, which would redraw while a step runs; stdout belongs to the command's answer.
            self._live = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False)
            self._task = self._live.add_task(escape(title), total=total, completed=done, text=f"{done}/{total}")
            self._live.start()
            self._live.refresh()

    def is_due(self, done: int) -> bool:
        """Whether `done` is worth drawing now."""
        waited = time.monotonic() - self._drawn_at
        if self._live is not None:
            return waited >= _REDRAW_SECONDS or done == self.total
        soon, late = _LOG_SECONDS
        return (waited >= soon and done - self._last >= self._every) or waited >= late or done == self.total

    def draw(self, done: int, *parts: str) -> None:
        text = "  ".join([f"{done}/{self.total}", *parts])
        if self._live is not None:
            self._live.update(self._task, completed=done, text=escape(text), refresh=True)
        else:
            logger.info("%s %s", self.title, text)
        self.shown = self._last = done
        self._drawn_at = time.monotonic()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class _Smoothed:
    """Running mean that forgets: each new value counts 1 - decay, and the start is not drawn towards 0."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)

    @property
    def value(self) -> float:
        return self._sum / self._weight


def _speed_text(seconds_per_step: float) -> str:
    return f"{1 / seconds_per_step:.1f} it/s" if seconds_per_step < 1 else f"{seconds_per_step:.1f} s/it"


def _duration_text(seconds: float) -> str:
    """`4:05`, or `1:04:05` from an hour up."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
