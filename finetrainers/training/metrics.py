"""Writes `metrics.jsonl`: one row per optimizer step and per validation, exact and finite, whatever was resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from finetrainers.errors import RunError
from finetrainers.folder import RunFolder, read_rows, write_atomically
from finetrainers.memory.report import peak_memory_gib, reserved_gib
from finetrainers.training.callback import Callback

if TYPE_CHECKING:
    from finetrainers.training.state import StepOutcome
    from finetrainers.training.trainer import Trainer

Row = dict[str, Any]
"""`step` and numbers; a step's row has `loss`, a validation's has not."""


class MetricsFile(Callback):
    """Turns what a step gave into numbers, keeps them, and hands each row to `listeners` (progress line, trackers).

    On a CUDA device a step's numbers are read when the next step ends, so that reading never makes the device wait
    for the host; whatever is pending is written before a validation, a checkpoint and the end. A loss or gradient
    norm that is not finite ends the run before a checkpoint can hold it.
    """

    def __init__(self, folder: RunFolder, *, listeners: Sequence[Callable[[Row], None]] = ()) -> None:
        self._path = folder.metrics
        self._listeners = tuple(listeners)
        self._file: TextIO | None = None
        self._pending: _Pending | None = None
        self._validated: set[int] = set()

    def has_validation(self, step: int) -> bool:
        """Whether the numbers of a validation at `step` are on disk, from this run or from before it was resumed."""
        return step in self._validated

    def on_start(self, trainer: Trainer) -> None:
        rows = _rows_until(trainer.state.step, self._path)
        self._validated = {row["step"] for row in rows if "loss" not in row}
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._path.open("a", buffering=1, encoding="utf-8")

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        self._write_pending()
        memory = {"memory_gib": peak_memory_gib(trainer.device)}
        if (reserved := reserved_gib(trainer.device)) is not None:
            memory["memory_reserved_gib"] = reserved
        self._pending = _Pending(outcome, memory)
        if trainer.device.type == "cpu":
            self._write_pending()

    def on_validation(self, trainer: Trainer, metrics: dict[str, float], videos: dict[str, Path]) -> None:
        self._write_pending()
        if metrics:
            self._write({"step": trainer.state.step, **metrics})
            self._validated.add(trainer.state.step)

    def on_checkpoint(self, trainer: Trainer) -> None:
        self._write_pending()
        assert self._file is not None, "on_checkpoint before on_start"
        os.fsync(self._file.fileno())

    def on_end(self, trainer: Trainer) -> None:
        self._write_pending()

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._write_pending()
        except (RunError, RuntimeError):
            # Only a run that already failed has a row pending here, and the device may be what failed: its own error
            # is the one to be seen.
            pass
        finally:
            self._file.close()
            self._file = None

    def _write_pending(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._write(pending.row())

    def _write(self, row: Row) -> None:
        for name, number in row.items():
            if not math.isfinite(number):
                raise RunError(
                    f"{name} is {number} at step {row['step']}: training has diverged. Checkpoints on disk are from "
                    "before that and good; lower optimizer.lr, or set training.precision=fp32"
                )
        assert self._file is not None, "a row before on_start"
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        for listener in self._listeners:
            listener(row)


class _Pending:
    """A step's row whose numbers may still be on their way from the device."""

    def __init__(self, outcome: StepOutcome, memory: Row) -> None:
        self._outcome = outcome
        self._memory = memory
        self._loss, self._grad_norm = outcome.loss, outcome.grad_norm
        self._arrived: torch.cuda.Event | None = None
        if outcome.loss.is_cuda:
            # .item() would wait for everything queued, the next step too; a copy behind this step only for this step.
            self._loss = outcome.loss.to("cpu", non_blocking=True)
            self._grad_norm = outcome.grad_norm.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def row(self) -> Row:
        if self._arrived is not None:
            self._arrived.synchronize()
        outcome = self._outcome
        return {
            "step": outcome.step,
            "epoch": outcome.epoch,
            "loss": self._loss.item(),
            "grad_norm": self._grad_norm.item(),
            "lr": outcome.lr,
            "step_time": outcome.step_time,
            "data_time": outcome.data_time,
            "samples_per_s": outcome.num_samples / outcome.step_time,
            "tokens_per_s": outcome.num_tokens / outcome.step_time,
            **self._memory,
        }


def _rows_until(step: int, path: Path) -> list[Row]:
    """Rows on disk that a run standing at `step` has not to write again: none at step 0, where nothing was resumed."""
    if step == 0:
        return []
    return [row for row in read_rows(path) if row["step"] <= step]
