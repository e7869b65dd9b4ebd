"""One run in a process of its own: `python -m benchmarks.gpu.child NAME FILE`, started by run.py."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.runs import RUNS, tiny


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; what is known goes to the file as it comes to be known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--timed", type=int, help="left out: 15, and with --tiny 2")
    options = parser.parse_args(arguments)
    # Not before: a name that there is not is refused at once.
    import torch

    from benchmarks.gpu.measures import Record
    from benchmarks.gpu.training import Bench

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = tiny(RUNS[options.name]) if options.tiny else RUNS[options.name]
    record = Record(options.file)
    record.put(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        warm_up, timed = (1, 2) if options.tiny else (5, 15)
        bench = Bench(record, Path(folder), options.tiny, warm_up, options.timed or timed)
        _measure(run.kind)(run, bench)


def _measure(kind: str) -> Callable[[Any, Any], None]:
    from benchmarks.gpu import encoding, limits, training

    kinds = {
        "train": training.measure_training,
        "peft": training.measure_peft,
        "save": training.measure_saving,
        "encode": encoding.measure_encoding,
        "limits": limits.measure_limits,
    }
    return kinds[kind]


if __name__ == "__main__":
    main()
