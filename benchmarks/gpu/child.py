"""One run in a process of its own: `python -m benchmarks.gpu.child NAME FILE`, started by run.py."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.encoding import measure_encoding
from benchmarks.gpu.limits import measure_limits
from benchmarks.gpu.measures import Record
from benchmarks.gpu.runs import RUNS, tiny
from benchmarks.gpu.training import Bench, measure_peft, measure_saving, measure_training

KINDS = {
    "train": measure_training,
    "peft": measure_peft,
    "save": measure_saving,
    "encode": measure_encoding,
    "limits": measure_limits,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; what is known goes to the file as it comes to be known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--matmul-rate", type=float)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = tiny(RUNS[options.name]) if options.tiny else RUNS[options.name]
    record = Record(options.file)
    record.put(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        warm_up, timed = (1, 2) if options.tiny else (5, 15)
        bench = Bench(record, Path(folder), options.tiny, warm_up, timed, options.matmul_rate)
        KINDS[run.kind](run, bench)


if __name__ == "__main__":
    main()
