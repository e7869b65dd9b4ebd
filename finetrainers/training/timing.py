"""The times of a run's steps, and which of them tell what a step takes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from finetrainers.data.batch import Size
from finetrainers.memory.report import peak_memory_gib, peak_reserved_gib
from finetrainers.training.callback import Callback
from finetrainers.training.instruments import Clock

if TYPE_CHECKING:
    from finetrainers.training.state import StepOutcome
    from finetrainers.training.trainer import Trainer

WARM_UP = 3
"""Steps that are never timed: the first one makes the optimizer's state, and clocks and caches settle."""

Rounds = list[list[Size]]
"""Of one step: for each of its rounds of batches the size of every process's batch."""


class StepTimes(Callback):
    """Times each step on the device, and keeps what it gave. Put it last: what other callbacks do is part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.outcomes: list[StepOutcome] = []
        self.peak_allocated_gib = 0.0
        """Since the first step began on a CUDA device, of the whole process on a CPU."""
        self.peak_reserved_gib: float | None = None
        self._device = device
        self._clock = Clock(device)

    def seconds(self) -> list[float]:
        """Of every step, waiting for data included."""
        return self._clock.seconds()

    def on_start(self, trainer: Trainer) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._clock.mark()

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        self._clock.mark()
        self.outcomes.append(outcome)

    def on_end(self, trainer: Trainer) -> None:
        self.peak_allocated_gib = peak_memory_gib(self._device)
        self.peak_reserved_gib = peak_reserved_gib(self._device)


def sizes_of_steps(trainer: Trainer) -> Iterator[Rounds]:
    """Of every step from the first on, without end; nothing is read."""
    batches, count = trainer.batches, trainer.gradient_accumulation_steps
    for step in itertools.count():
        yield [batches.sizes(position_of(step, trainer) + part * batches.world_size) for part in range(count)]


def position_of(step: int, trainer: Trainer) -> int:
    """Number of the first batch of a step, steps being counted from 0."""
    return step * trainer.gradient_accumulation_steps * trainer.batches.world_size


def choose_steps(steps: Iterator[Rounds], *, count: int, meetings: int = 1) -> dict[int, Rounds]:
    """The first `count` steps, by their numbers from 0, that are worth timing: none of the first few, and none in which
    a process meets a size for one of its first `meetings` times. At the first it is compiled and tuned for, and where
    passes are recorded, at the second it is recorded."""
    seen: Counter[tuple[int, Size]] = Counter()
    chosen: dict[int, Rounds] = {}
    for number, rounds in enumerate(steps):
        met = [(rank, size) for sizes in rounds for rank, size in enumerate(sizes)]
        if number >= WARM_UP and all(seen[each] >= meetings for each in met):
            chosen[number] = rounds
        if len(chosen) == count:
            break
        seen.update(met)
    return chosen
