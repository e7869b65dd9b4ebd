"""Which steps are timed; and that sizes told ahead are those of the batches that come."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from finetrainers.data.batch import Size
from finetrainers.training.timing import WARM_UP, choose_steps, sizes_of_steps
from finetrainers.types import Bucket, Condition


def size(num_samples: int, num_frames: int = 9) -> Size:
    return Size(Bucket(num_frames, 64, 96), Condition(), num_samples)


def chosen(of_steps: list[list[list[Size]]], count: int) -> list[int]:
    return list(choose_steps(itertools.cycle(of_steps), count=count))


@pytest.mark.parametrize(
    ("of_steps", "count", "expected"),
    [
        # One size: all but the first few.
        ([[[size(2)]]], 4, [3, 4, 5, 6]),
        # An epoch's last batch is smaller, and new when it first comes.
        ([[[size(2)]]] * 4 + [[[size(1)]]], 6, [3, 5, 6, 7, 8, 9]),
        # A new size in one of a step's batches, or on one of two processes.
        ([[[size(2)], [size(2)]]] * 3 + [[[size(2)], [size(1)]]] * 2, 2, [4, 5]),
        ([[[size(2), size(2)]]] * 3 + [[[size(2), size(2, 17)]], [[size(2, 17), size(2)]]], 3, [5, 6, 7]),
    ],
)
def test_steps_with_a_new_size_are_not_timed(of_steps: Any, count: int, expected: list[int]) -> None:
    assert chosen(of_steps, count) == expected
    assert min(expected) >= WARM_UP


def test_where_passes_are_recorded_a_size_is_new_twice() -> None:
    of_steps = itertools.cycle([[[size(2)]]] * 4 + [[[size(1)]]])
    assert list(choose_steps(of_steps, count=8, meetings=2)) == [3, 5, 6, 7, 8, 10, 11, 12]
    # Twice within one step.
    assert list(choose_steps(itertools.repeat([[size(2)], [size(2)]]), count=2, meetings=2)) == [3, 4]


def test_each_batch_of_a_step_is_asked_for() -> None:
    batches = SimpleNamespace(world_size=2, sizes=lambda position: [position, position + 1])
    trainer: Any = SimpleNamespace(batches=batches, gradient_accumulation_steps=3)
    steps = list(itertools.islice(sizes_of_steps(trainer), 2))
    assert steps == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
