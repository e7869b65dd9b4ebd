"""Weak scaling of whole runs of the command line on 1, 2 and 4 CPU processes over gloo: the same work for each, one
thread each. Beside it the bytes that each process sends in a step: what `finetrainers.scaling` says, and what went
through the loopback device.
Run: python benchmarks/scaling.py [STRATEGY ...]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from machine import describe_machine
from tiny_ltx import write_tiny_ltx

from finetrainers.demo.clips import render_clips
from finetrainers.folder import RunFolder, read_rows
from finetrainers.scaling import ENGINES

PROCESSES = (1, 2, 4)
SHORT, LONG = 5, 20
"""Steps of two runs, whose difference is free of what is sent before and after the steps."""
BATCH_SIZE, REPEATS = 2, 3


def write_config(folder: Path) -> Path:
    """Full fine-tuning of 6 layers of width 256, so that there is something to send."""
    settings = {
        "model": {"path": str(write_tiny_ltx(folder / "model", num_heads=32, num_layers=6))},
        "data": {
            "train": str(render_clips(folder / "clips", 8, num_frames=17, height=192, width=192).parent),
            "buckets": ["17x192x192"],
            "cache": str(folder / "cache"),
        },
        "method": {"name": "full"},
        "training": {"batch_size": BATCH_SIZE, "precision": "fp32"},
        "validation": {"every": 0},
        "checkpoint": {"every": 0},
        "output": str(folder / "run"),
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def call(*arguments: str) -> str:
    """What a finetrainers command prints, with one thread for each of its processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetrainers", *arguments, "--quiet"]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def loopback_bytes() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def train(config: Path, strategy: str, processes: int, steps: int) -> tuple[float, int]:
    """Median seconds of a step after the first five, if there are more, and bytes over the loopback device."""
    before = loopback_bytes()
    options = [f"parallel.strategy={strategy}", f"training.steps={steps}"]
    call("train", str(config), *options, "--nproc", str(processes), "--resume", "never")
    sent = loopback_bytes() - before
    rows = read_rows(RunFolder(str(config.parent / "run")).metrics)
    return statistics.median(row["step_time"] for row in rows[SHORT if steps > SHORT else 0 :]), sent


def measure(config: Path, strategy: str, processes: int) -> dict[str, Any]:
    """One row of the record: the fastest of `REPEATS` runs, because other work on the machine only adds, and the median
    of their bytes."""
    pairs = [[train(config, strategy, processes, steps) for steps in (SHORT, LONG)] for _ in range(REPEATS)]
    seconds = [long[0] for _, long in pairs]
    sent = [(long[1] - short[1]) / (LONG - SHORT) / processes for short, long in pairs]
    plan = json.loads(call("plan", str(config), "--json", "--nodes", "1", "--gpus-per-node", str(processes)))
    told = {row["engine"]: row["sent_bytes"] for row in plan["scaling"]["engines"]}
    step = min(seconds)
    return {
        "processes": processes,
        "step_seconds": step,
        "step_seconds_of_all_runs": seconds,
        "samples_per_second": BATCH_SIZE * processes / step,
        "sent_bytes_measured": statistics.median(sent),
        "sent_bytes_model": next((told[name] for name in ENGINES if name.split()[0] == strategy), None),
    }


def main() -> None:
    """Measure each strategy of the command line; write and print the record."""
    strategies = sys.argv[1:] or ["ddp"]
    results: dict[str, Any] = {}
    others = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        call("precompute", str(config))
        for strategy in strategies:
            rows = [measure(config, strategy, processes) for processes in PROCESSES]
            for row in rows:
                row["efficiency"] = row["samples_per_second"] / row["processes"] / rows[0]["samples_per_second"]
            results[strategy] = rows
    cores = os.cpu_count() or 1
    note = f"{cores} cores: beyond {cores} processes share them, and efficiency falls to {cores} / processes at best"
    machine = describe_machine() | {"torch_threads": 1, "load_before": others}
    record = {"machine": machine, "note": note, "results": results}
    Path(__file__).with_name("results").joinpath("scaling.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
