"""SIGINT, SIGTERM and SIGUSR1: the step is finished and saved; a second signal ends the program at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from finetrainers.errors import Interrupted

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """A context in which signals ask the run to stop. Before `defer` they stop it on the spot, which is safe while
    only the cache is written; after it they set a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers only in the main thread; a run started from another is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _WATCHED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on, let the loop finish its step."""
        self._deferred = True

    def requested(self) -> bool:
        """Whether a signal asked the run to stop."""
        return self._received is not None

    def raise_if_requested(self) -> None:
        """Raise Interrupted, which becomes the exit code, once all is saved."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            os._exit(128 + number)
        self._received = number
        if not self._deferred:
            raise Interrupted(number)
