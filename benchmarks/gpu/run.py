"""Runs of full-size models with random weights on one GPU, each in a process of its own; a JSON line each is appended
to benchmarks/results/gpu.jsonl, also for one that fails. Exit code 0: all ran; 1: one failed; 2: nothing was run.
Run: python benchmarks/gpu/run.py [NAME ...] [--part N], or --complete for lines that were made with --measure-only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.lines import (  # noqa: E402
    RESULTS,
    append_line,
    describe_commit,
    describe_gpu,
    read_lines,
    replace_line,
)
from benchmarks.gpu.runs import PART_SECONDS, Run, choose, parts  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402
from finetrainers.errors import UserError  # noqa: E402


def list_runs(grouped: Sequence[Sequence[Run]]) -> Iterator[str]:
    """A line for each run, under the part that it belongs to."""
    for number, part in enumerate(grouped, start=1):
        yield f"part {number}, about {sum(run.minutes for run in part):g} minutes"
        for run in part:
            what = f"{run.model} {run.size}: {run.setting}" if run.model else run.setting
            yield f"  {run.name:<15}{run.minutes:>4g} min  {what}; goal {run.goal}"


def run_one(run: Run, options: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """Measure in another process, which has so many seconds. Returns its line."""
    with tempfile.TemporaryDirectory() as folder:
        known, log = Path(folder) / "known.json", Path(folder) / "log.txt"
        command = [sys.executable, "-m", "benchmarks.gpu.child", run.name, str(known)]
        command += ["--tiny"] if options.tiny else []
        command += [f"--timed={options.timed}"] if options.timed else []
        begun, failed = time.monotonic(), None
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=_environment(options), stdout=output, stderr=output, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                failed = f"stopped after {seconds:.0f} s, which were left of the {PART_SECONDS} s of a part"
            else:
                failed = _reason(log.read_text(), code) if code else None
        measured = json.loads(known.read_text()) if known.exists() else {}
    line = {"run": run.name, "setting": run.setting, "model": run.model, "size": run.size, "card_gib": run.card_gib}
    line |= {"tiny": options.tiny, "date": datetime.now(timezone.utc).isoformat(), "commit": options.commit}
    line |= {**describe_gpu(), "machine": describe_machine(), "wall_seconds": time.monotonic() - begun, **measured}
    return line if failed is None else line | {"failed": failed}


def complete_file(results: Path) -> int:
    """Complete its lines that lack what is computed, each in its place. Returns how many could not be."""
    # Not before, because it imports torch.
    from benchmarks.gpu.computed import complete_line

    num_failed, lines = 0, read_lines(results)
    for index, line in enumerate(lines):
        begun = time.monotonic()
        try:
            whole = complete_line(line, lines)
        except UserError as error:
            print(f"line {index + 1}, {line['run']}: {error}", file=sys.stderr)
            num_failed += 1
            continue
        if whole is not line:
            replace_line(results, index, whole)
            print(f"{line['run']}: completed in {time.monotonic() - begun:.0f} s", flush=True)
    return num_failed


def _completed(line: dict[str, Any], results: Path) -> dict[str, Any]:
    # Not before, because it imports torch.
    from benchmarks.gpu.computed import complete_line

    return complete_line(line, read_lines(results))


def _environment(options: argparse.Namespace) -> dict[str, str]:
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | changes | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})


def _reason(log: str, code: int) -> str:
    """Why a process ended with this exit code, from the end of what it printed."""
    lines = [text for text in log.splitlines() if text.strip()]
    last = next((text for text in reversed(lines) if "Error" in text), lines[-1] if lines else "nothing was printed")
    return f"exit code {code}: {last.strip()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is named, one after the other; returns the exit code."""
    options = _parse(arguments)
    if options.complete:
        if options.names or options.part is not None:
            return _refuse("--complete goes over the whole file: leave out NAME and --part")
        if not options.results.is_file():
            return _refuse(
                f"there is no file {options.results} to complete; runs write it, and --results names another"
            )
        return 1 if complete_file(options.results) else 0
    if options.timed is not None and options.timed < 2:
        return _refuse(f"--timed {options.timed}: the spread of times takes 2 steps or more")
    try:
        chosen = choose(options.names)
    except KeyError as error:
        return _refuse(f"there is no run {error.args[0]}; --list shows them")
    grouped = parts(chosen)
    if options.part is not None and not 1 <= options.part <= len(grouped):
        return _refuse(f"--part {options.part}: of these runs there are parts 1 to {len(grouped)}")
    if options.list:
        print("\n".join(list_runs(grouped)))
        return 0
    if options.device == "cuda" and not _has_cuda():
        return _refuse("there is no CUDA device; --tiny runs tiny models on the CPU")
    num_failed, begun = 0, time.monotonic()
    for run in chosen if options.part is None else grouped[options.part - 1]:
        # Of a part all runs together have the time; by name each has it.
        left = PART_SECONDS if options.part is None else PART_SECONDS - (time.monotonic() - begun)
        line = run_one(run, options, seconds=max(left, 1.0))
        try:
            line = line if options.measure_only else _completed(line, options.results)
        finally:
            # What was measured is kept, whatever becomes of the rest.
            append_line(options.results, line)
        num_failed += "failed" in line
        print(f"{run.name}: {line.get('failed', 'measured')} in {line['wall_seconds']:.0f} s", flush=True)
    return 1 if num_failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="R6 is R6 and R6-fp8; left out: all")
    parser.add_argument("--part", type=int, help="only this part of them, all of which takes at most 8 minutes")
    parser.add_argument("--timed", type=int, metavar="N", help="steps that are timed; left out: 15, and with --tiny 2")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the runs, their goals and expected minutes")
    what.add_argument("--measure-only", action="store_true", help="leave for --complete what needs no GPU")
    what.add_argument("--complete", action="store_true", help="compute what the file's lines lack, on any CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, on the CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="left out: cuda, and with --tiny cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where lines are appended")
    parser.add_argument("--commit", default=describe_commit(), help="left out: what git says")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    return options


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
