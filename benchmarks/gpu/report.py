"""The table of what was measured on a GPU, beside its goals, what others published, and what was predicted.
Run: python benchmarks/gpu/report.py [FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.lines import RESULTS, Line, newest, read_lines  # noqa: E402
from benchmarks.gpu.runs import RUNS, Run  # noqa: E402


def table(lines: list[Line]) -> Iterator[str]:
    """Lines of markdown, a row for each run, measured or not."""
    yield "| run | setting | goal | published | measured | predicted |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for run in RUNS.values():
        what = f"{run.model} {run.size}: {run.setting}" if run.model else run.setting
        line = newest(lines, run.name)
        cells = ("not run", "") if line is None else (_measured(run, line, lines), _predicted(line))
        yield f"| {' | '.join((run.name, what, run.goal, run.published, *cells))} |"


def _measured(run: Run, line: Line, lines: list[Line]) -> str:
    if "failed" in line:
        return line["failed"].replace("|", "/")
    said = []
    if "seconds" in line:
        said.append(f"{line['seconds']['median']:.3g} s (95 %: {line['seconds']['p95']:.3g})")
        said += _ratio(line, run.against, newest(lines, run.against))
    if (peak := line.get("memory", {}).get("max_allocated_gib")) is not None:
        said.append(f"{peak:.1f} GiB, {line['memory']['max_reserved_gib']:.1f} reserved")
    for key, name in (("mfu", "MFU"), ("hfu", "HFU"), ("of_floor", "of limit")):
        if line.get(key) is not None:
            said.append(f"{name} {line[key]:.0%}")
    if line.get("moved_seconds_at_25_gb", 0) > 0.01:
        said.append(f"{line['moved_seconds_at_25_gb']:.2g} s of copies at 25 GB/s")
    if "matmul_rate" in line:
        said += _limits(line)
    if "save" in line:
        said.append(f"stall {line['save']['stall_seconds']:.2g} s")
    return ", ".join(said)


def _ratio(line: Line, name: str, other: Line | None) -> list[str]:
    if other is None or "failed" in other:
        return []
    return [f"{line['seconds']['median'] / other['seconds']['median']:.2f}x {name}"]


def _limits(line: Line) -> list[str]:
    said = [f"matmul {line['matmul_rate'] / 1e12:.0f} TFLOP/s"]
    for name, rates in line.get("attention", {}).items():
        both: Any = rates if isinstance(rates, str) else f"{rates['forward'] / 1e12:.0f} / {rates['both'] / 1e12:.0f}"
        said.append(f"{name}: {both}")
    return said + [f"{name} {rate / 1e9:.0f} GB/s" for name, rate in line.get("copies", {}).items()]


def _predicted(line: Line) -> str:
    if "predicted_gib" not in line:
        return ""
    error = line.get("predicted_error")
    return f"{line['predicted_gib']:.1f} GiB" + ("" if error is None else f" ({error:+.1%})")


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    for line in table(read_lines(Path(arguments[0]) if arguments else RESULTS)):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
