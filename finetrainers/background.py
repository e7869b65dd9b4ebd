"""Work that threads do for the main one, in order: results before they are asked for, and jobs behind its back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

T = TypeVar("T")


def read_ahead(jobs: Iterable[Callable[[], T]], *, num_workers: int, name: str) -> Iterator[T]:
    """The results of jobs, in their order. Threads work on one job each while the results before theirs are in use;
    without threads, each job is done when its result is asked for.

    The jobs themselves are drawn by whoever takes the results, one more than there are threads ahead of them.
    """
    if num_workers == 0:
        for job in jobs:
            yield job()
        return
    with closing(begun_ahead(jobs, num_workers=num_workers, name=name)) as begun:
        for future in begun:
            yield future.result()


def begun_ahead(jobs: Iterable[Callable[[], T]], *, num_workers: int, name: str) -> Generator[Future[T], None, None]:
    """The same jobs, each as soon as threads work ahead of it: it may not be done yet."""
    ahead: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix=name)
    try:
        for job in jobs:
            ahead.append(pool.submit(job))
            if len(ahead) > num_workers:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def done_behind(name: str) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Hands jobs to a thread, while the block goes on. A job is taken only once the one before is done, so that no more
    than one is ever under way, and what went wrong with one is raised at the next, or at the end of the block."""
    last: list[Future[None]] = []

    def hand_over(job: Callable[[], None]) -> None:
        if last:
            last.pop().result()
        last.append(pool.submit(job))

    with ThreadPoolExecutor(1, thread_name_prefix=name) as pool:
        yield hand_over
        if last:
            last.pop().result()
