"""Trains the bundled model with one option changed at a time, and shows what each change does to what is learned.

python -m benchmarks.quality.run                  # all, about half an hour on two CPU cores
python -m benchmarks.quality.run --only rank full
python -m benchmarks.quality.run --table          # only print the table of the record
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import describe_machine
from benchmarks.quality.variants import VARIANTS, Variant
from finetrainers.commands.demo import Shown, demo_settings, held_out_losses, write_clips
from finetrainers.demo.bundled import copy_bundled_model
from finetrainers.folder import RunFolder, read_rows, slug

RECORD = Path(__file__).parents[1] / "results" / "quality.json"
STEPS = 150


def settings_of(variant: Variant, root: Path, run: RunFolder, steps: int) -> dict[str, Any]:
    """The demo's config with the variant's options in their places."""
    settings = demo_settings(root, run, steps)
    settings["data"]["cache"] = str(root / "cache")
    for key, value in variant.overrides.items():
        *section, name = key.split(".")
        place = settings
        for part in section:
            place = place.setdefault(part, {})
        # A copy: a later option of the same variant may lie within this one.
        place[name] = copy.deepcopy(value)
    if settings["optimizer"].get("name") == "prodigy":
        # It finds its own.
        del settings["optimizer"]["lr"]
    return settings


def measure(variant: Variant, root: Path, steps: int) -> dict[str, Any]:
    """Train in a process of its own, and read what it left."""
    run = RunFolder(root / slug(f"{variant.group} {variant.name}"))
    config = run.root.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings_of(variant, root, run, steps)))
    processes = ["--nproc", str(variant.num_processes)] if variant.num_processes > 1 else []
    command = [sys.executable, "-m", "finetrainers", "train", str(config), *processes]
    done = subprocess.run(command, capture_output=True, text=True)
    row: dict[str, Any] = {"group": variant.group, "name": variant.name, "overrides": variant.overrides}
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-1][-300:]}
    before, after = held_out_losses(run)
    steps_done = [entry for entry in read_rows(run.metrics) if "loss" in entry]
    progress = Shown.read(run).progress()
    return row | {
        "held_out_loss_before": before,
        "held_out_loss": after,
        "style": {name: round(styled, 3) for name, (styled, _) in progress.items()},
        "style_without_trigger": {name: round(plain, 3) for name, (_, plain) in progress.items()},
        "step_seconds": round(statistics.median(entry["step_time"] for entry in steps_done[10:]), 4),
        "memory_gib": round(max(entry["memory_gib"] for entry in steps_done), 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    lines = [
        "| changed | to | held-out loss | style: black, hollow | the same without trigger | s a step | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['group']} | {row['name']} | {row['error']} | | | | |")
            continue
        styles = [
            ", ".join(f"{value:.0%}" for value in row[name].values()) for name in ("style", "style_without_trigger")
        ]
        lines.append(
            f"| {row['group']} | {row['name']} | {row['held_out_loss']:.4f} | {styles[0]} | {styles[1]} "
            f"| {row['step_seconds']:.3f} | {row['memory_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of runs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {"rows": []}
    if not options.table:
        done = {(row["group"], row["name"]): row for row in record["rows"]}
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_clips(root / "clips")
            copy_bundled_model(root / "model")
            for variant in VARIANTS:
                if options.only and variant.group not in options.only:
                    continue
                row = measure(variant, root, options.steps)
                print(json.dumps(row), flush=True)
                done[variant.group, variant.name] = row
                order = [(variant.group, variant.name) for variant in VARIANTS]
                rows = [done[key] for key in order if key in done]
                record = {"machine": describe_machine(), "steps": options.steps, "rows": rows}
                RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
