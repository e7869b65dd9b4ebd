"""Runs of the command line in processes of their own, started from a server that has torch imported already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from finetrainers.folder import read_rows

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["finetrainers.commands.train", "benchmarks.tiny_ltx", "diffusers.optimization", "peft"])

EXACT = ("step", "epoch", "loss", "grad_norm", "lr")
"""What a resumed run must repeat to the bit; the rest of a row is time and memory."""


@dataclass
class Run:
    """A command that was started, and what it said so far."""

    process: ForkServerProcess
    log: Path

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL, unless the run ended by itself before. Returns whether it was killed."""
        self.process.join(seconds)
        if alive := self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        return alive

    def signal_when(self, number: int, path: Path, timeout: float = 60) -> None:
        """Send a signal as soon as a file is there and not empty."""
        deadline = time.monotonic() + timeout
        while not (path.is_file() and path.stat().st_size):
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.005)
        os.kill(self.process.pid, number)

    def end(self, timeout: float = 550) -> int:
        """Wait for the end and return the exit code. Most tests have a shorter limit of their own."""
        self.process.join(timeout)
        assert not self.process.is_alive(), f"still running after {timeout} s:\n{self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def start(arguments: list[str], log: Path) -> Run:
    """Start `finetrainers ARGUMENTS` with its output in a file."""
    log.unlink(missing_ok=True)
    process = SERVER.Process(target=_child, args=([str(argument) for argument in arguments], str(log)))
    process.start()
    return Run(process, log)


def run(arguments: list[str], log: Path) -> tuple[int, str]:
    """Run to the end; returns the exit code and everything that was printed."""
    started = start(arguments, log)
    code = started.end()
    return code, started.said()


def _child(arguments: list[str], log: str) -> None:
    from finetrainers.cli import main

    with written_to(log):
        code = main(arguments)
    sys.exit(code)


@contextlib.contextmanager
def written_to(log: str) -> Iterator[None]:
    """In the block, all that this process and its children print goes to the end of a file."""
    with open(log, "a", buffering=1) as file:  # noqa: PTH123 - its descriptor is what matters
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield


def write_config(path: Path, **sections: Any) -> Path:
    """A config file of these sections; dotted keys do not exist here, only nested dicts."""
    path.write_text(yaml.safe_dump(sections))
    return path


def exact_rows(output: Path) -> list[dict[str, Any]]:
    """The steps of a run, each with what must be repeated to the bit, and its validations."""
    rows = read_rows(output / "metrics.jsonl")
    return [{key: row[key] for key in (*EXACT, "validation_loss") if key in row} for row in rows]
