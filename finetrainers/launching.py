"""Starts a command on several processes of this machine, through torchrun's own launcher."""

from __future__ import annotations

import logging
import sys
import tempfile
from os import getpid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(argv: list[str], *, num_processes: int) -> int:
    """Run `finetrainers ARGV` on so many processes and return the exit code of the first that failed, 0 if none did.
    When one fails, the others are ended; it has said why."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"finetrainers-{getpid()}",
        max_restarts=0,
    )
    # Its own log repeats each failure with a table of process ids.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "finetrainers", *_without_nproc(argv))
    except ChildFailedError as error:
        return min(error.failures.values(), key=lambda failure: failure.timestamp).exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    finally:
        for mark in Path(tempfile.gettempdir()).glob(f"finetrainers-{getpid()}-*-*.failed"):
            mark.unlink(missing_ok=True)
    return 0


def _without_nproc(argv: list[str]) -> list[str]:
    """The command line that each process is given."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--nproc" and not word.startswith("--nproc="):
            kept.append(word)
        skip = word == "--nproc"
    return kept
