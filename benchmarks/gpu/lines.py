"""The results file: one JSON line a run, appended; of the runs of a name the newest counts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetrainers.folder import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"

Line = dict[str, Any]


def read_lines(results: Path) -> list[Line]:
    """All of them, the oldest first; none where there is no file yet."""
    if not results.is_file():
        return []
    return [json.loads(text) for text in results.read_text().splitlines()]


def append_line(results: Path, line: Mapping[str, Any]) -> None:
    """Write one more."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def replace_line(results: Path, index: int, line: Mapping[str, Any]) -> None:
    """Write the file anew with another line in the place of one; lines appended meanwhile stay."""
    texts = results.read_text().splitlines()
    texts[index] = json.dumps(line)
    write_atomically(results, "".join(f"{text}\n" for text in texts))


def newest(lines: list[Line], name: str, *, tiny: bool = False) -> Line | None:
    """The newest of a run that did not fail; the newest that failed where there is no other."""
    found = [line for line in lines if line["run"] == name and line["tiny"] == tiny]
    return next((line for line in reversed(found) if "failed" not in line), found[-1] if found else None)


def describe_gpu() -> dict[str, str | None]:
    """Name and driver of the first GPU, as its driver's own tool says it; where there is none, nothing."""
    if shutil.which("nvidia-smi") is None:
        return {"gpu": None, "driver": None}
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = (
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[0].split(", ")
    )
    return {"gpu": name, "driver": driver}


def describe_commit() -> str | None:
    """What is checked out, marked where files differ from it; nothing outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() or None
