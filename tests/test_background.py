"""Threads work ahead and behind, in order and not too far, and what goes wrong in them is raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from finetrainers.background import done_behind, read_ahead


def slow_square(number: int) -> int:
    # The later ones are done first.
    time.sleep(0.02 / (number + 1))
    return number**2


@pytest.mark.parametrize("num_workers", [0, 1, 3, 20])
def test_results_come_in_order_and_jobs_are_drawn_a_few_ahead(num_workers):
    drawn: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(10):
            drawn.append(threading.get_ident())
            yield partial(slow_square, number)

    most = 0
    for taken, result in enumerate(read_ahead(jobs(), num_workers=num_workers, name="test")):
        assert result == taken**2
        most = max(most, len(drawn) - taken)
    assert most == min(num_workers + 1, 10)
    assert set(drawn) == {threading.get_ident()}, "whoever takes results draws the jobs"


def test_without_threads_a_job_is_done_where_its_result_is_asked_for():
    jobs = [threading.get_ident] * 3
    assert set(read_ahead(jobs, num_workers=0, name="test")) == {threading.get_ident()}
    assert threading.get_ident() not in set(read_ahead(jobs, num_workers=2, name="test"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_comes_in_the_place_of_its_result(num_workers):
    results = read_ahead((partial(divmod, 6, number) for number in (2, 1, 0, 3)), num_workers=num_workers, name="test")
    assert [next(results), next(results)] == [(3, 0), (6, 0)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_whoever_stops_taking_leaves_no_work_behind():
    done: list[int] = []
    release = threading.Event()

    def job(number: int) -> int:
        if number:
            release.wait(5)
        done.append(number)
        return number

    results = read_ahead((partial(job, number) for number in range(5)), num_workers=1, name="test")
    assert next(results) == 0
    results.close()
    release.set()
    time.sleep(0.05)
    assert done in ([0], [0, 1]), "at most what was under way"


def test_jobs_are_done_behind_in_order_one_at_a_time():
    under_way, most, done = 0, 0, []

    def job(number: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.002)
        done.append((number, threading.get_ident()))
        under_way -= 1

    with done_behind("test") as hand_over:
        for number in range(5):
            hand_over(partial(job, number))
            assert len(done) >= number, "the one before is done"
    assert [number for number, _ in done] == list(range(5)) and most == 1
    assert threading.get_ident() not in {thread for _, thread in done}


def test_the_block_goes_on_while_a_job_is_done():
    goes_on = threading.Event()
    with done_behind("test") as hand_over:
        hand_over(lambda: [None][not goes_on.wait(10)])
        goes_on.set()


def test_what_goes_wrong_behind_is_raised():
    def fail() -> None:
        raise OSError("no space left")

    reached = []
    with pytest.raises(OSError, match="no space"), done_behind("test") as hand_over:
        hand_over(fail)
        hand_over(lambda: reached.append("the next"))
        reached.append("the block")
    assert reached == []
    with pytest.raises(OSError, match="no space"), done_behind("test") as hand_over:
        hand_over(fail)


def test_a_block_that_fails_says_so_once_the_job_is_through():
    done = []

    def job() -> None:
        time.sleep(0.02)
        done.append(True)

    with pytest.raises(KeyboardInterrupt), done_behind("test") as hand_over:
        hand_over(job)
        raise KeyboardInterrupt
    assert done == [True]
