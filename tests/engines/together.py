"""Runs of the command line on several processes, forked from a server that has torch imported already."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.end_to_end.runs import SERVER, written_to


def nothing() -> None:
    """What processes do before their first command, unless said otherwise."""


def run_together(
    count: int, commands: Sequence[Sequence[Any]], log: Path, *, before: Callable[[], None] = nothing
) -> str:
    """Run `finetrainers COMMAND` on so many processes, one command after the other in the same processes; returns what
    all of them said."""
    # As torchrun's agent does, so that each command's processes can find each other at the same place.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    arguments = [[str(word) for word in command] for command in commands]
    children = [
        SERVER.Process(target=_child, args=(rank, count, store.port, arguments, str(log), before))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    said = log.read_text()
    assert codes == [0] * count, said
    return said


def _child(rank: int, count: int, port: int, commands: list[list[str]], log: str, before: Callable[[], None]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "DS_ACCELERATOR": "cpu",
    }
    from finetrainers.cli import main

    with written_to(log):
        before()
        for number, command in enumerate(commands):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
            if "parallel.strategy=deepspeed" in command:
                _forget_deepspeed()
            if code := main(command):
                sys.exit(code)


def _forget_deepspeed() -> None:
    """DeepSpeed keeps the processes of the run before, and would compile a faster gloo for CPUs, for a minute."""
    import deepspeed

    deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
