"""Writes `report.html`: one self-contained page that shows a run from what is on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

import yaml

from finetrainers.errors import UserError
from finetrainers.folder import RunFolder, read_rows, write_atomically
from finetrainers.reporting.charts import Curve, Point, chart, number_text, running_median, smoothed
from finetrainers.reporting.videos import video_table

VIDEO_BUDGET_BYTES = 40 * 2**20
"""What the videos inside the page may weigh, encoded."""
_MOST_PROBLEMS = 200
_MEMORY_COLUMNS = {
    "allocated": "held",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "peak": "peak",
    "reserved": "reserved",
}
"""Of the rows of memory.jsonl, in GiB, and their names in the table."""

Row = dict[str, Any]


def write_report(folder: RunFolder, *, video_budget_bytes: int = VIDEO_BUDGET_BYTES) -> Path:
    """Write the report of a run, finished or not, and give its path. Raises UserError when there is no run."""
    if not folder.config.is_file() and not folder.metrics.is_file():
        raise UserError(f"{folder.root} is not a run's folder: it has neither {folder.config.name} nor metrics.jsonl")
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.is_file() else {}
    rows = read_rows(folder.metrics)
    memory = _newest_run(read_rows(folder.memory))
    sections = [
        ("Curves", _curves(rows)),
        ("Samples", video_table(folder, budget_bytes=video_budget_bytes)),
        ("Memory", _memory_table(memory)),
        ("Skipped clips", _problems_table(read_rows(folder.problems))),
        ("Settings", _settings(config)),
    ]
    page = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(folder.root.resolve().name),
        subtitle=_subtitle(config),
        facts=_facts(rows, memory, planned=config.get("training", {}).get("steps")),
        sections="".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content),
    )
    # Names of files may hold bytes that are no text.
    write_atomically(folder.report, page.encode("utf-8", errors="replace"))
    return folder.report


def _subtitle(config: Row) -> str:
    parts = [config.get("model", {}).get("path"), config.get("model", {}).get("task")]
    method = config.get("method", {})
    parts.append(f"{method['name']}, rank {method['rank']}" if "rank" in method else method.get("name"))
    return " · ".join(escape(str(part)) for part in parts if part)


def _points(rows: Iterable[Row], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]


def _curves(rows: Sequence[Row]) -> str:
    loss, grad_norm, step_time = (_points(rows, name) for name in ("loss", "grad_norm", "step_time"))
    # A twentieth of the run, so that the trend shows in short runs and in long ones.
    width = max(4, min(100, len(loss) // 20))
    charts = [
        ("Loss, smoothed", [Curve(loss, "faint"), Curve(smoothed(loss, decay=1 - 1 / width), "line")]),
        ("Validation loss", [Curve(_points(rows, "validation_loss"), "dots")]),
        ("Gradient norm, median", [Curve(grad_norm, "faint"), Curve(running_median(grad_norm, width=width), "line")]),
        ("Learning rate", [Curve(_points(rows, "lr"), "line")]),
        (
            "Seconds per step, median",
            [Curve(step_time, "faint"), Curve(running_median(step_time, width=width), "line")],
        ),
        ("Peak memory, GiB", [Curve(_points(rows, "memory_gib"), "line")]),
    ]
    drawn = "".join(chart(title, curves) for title, curves in charts if curves[0].points)
    return f"<div class='charts'>{drawn}</div>" if drawn else ""


def _facts(rows: Sequence[Row], memory: Sequence[Row], *, planned: int | None) -> str:
    """The run in a handful of numbers."""
    steps = [row for row in rows if "loss" in row]
    facts: list[tuple[str, str, str]] = []
    if steps:
        last = steps[-1]
        facts.append(("Steps", f"{last['step']}", f"of {planned or '?'}, epoch {last['epoch']}"))
        seconds = [row["step_time"] for row in steps]
        facts.append(("Time", _duration(sum(seconds)), f"{number_text(median(seconds))} s per step"))
        facts.append(("Loss", number_text(smoothed(_points(rows, "loss"), decay=0.95)[-1][1]), "at the end, smoothed"))
    facts.extend(_validation_facts(_points(rows, "validation_loss")))
    peaks = [*(row["memory_gib"] for row in steps), *(row["peak_gib"] for row in memory)]
    if peaks:
        facts.append(("Peak memory", f"{max(peaks):.2f} GiB", "highest of all phases"))
    return "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>" for name, value, note in facts
    )


def _validation_facts(points: Sequence[Point]) -> list[tuple[str, str, str]]:
    if not points:
        return []
    (first_step, first), (last_step, last) = points[0], points[-1]
    best_step, best = min(points, key=lambda point: point[1])
    change = f"{100 * (last / first - 1):+.1f} % since step {first_step:g}" if len(points) > 1 and first else ""
    return [
        ("Best validation loss", number_text(best), f"at step {best_step:g}"),
        ("Last validation loss", number_text(last), change or f"at step {last_step:g}"),
    ]


def _newest_run(memory: Sequence[Row]) -> Sequence[Row]:
    """The rows since the run was last started: a resumed run adds its own."""
    starts = [index for index, row in enumerate(memory) if row["phase"] == "start"]
    return memory[starts[-1] :] if starts else memory


def _memory_table(memory: Sequence[Row]) -> str:
    if not memory:
        return ""
    highest = max(row["peak_gib"] for row in memory) or 1
    # Parts are known while models are trained, and what the allocator reserved on a CUDA device.
    columns = [name for name in _MEMORY_COLUMNS if any(f"{name}_gib" in row for row in memory)]
    lines = []
    for row in memory:
        share = 100 * row["peak_gib"] / highest
        numbers = (f"{row[key]:.2f}" if (key := f"{name}_gib") in row else "" for name in columns)
        cells = "".join(f"<td class='number'>{number}</td>" for number in numbers)
        bar = f"<td class='bar'><i style='width:{share:.0f}%'></i></td>"
        lines.append(
            f"<tr><td>{escape(row['phase'])}</td>{cells}{bar}<td class='number'>{_duration(row['seconds'])}</td></tr>"
        )
    heads = (f"<th class='number'>{_MEMORY_COLUMNS[name]}, GiB</th>" for name in columns)
    head = "<th>phase ends</th>" + "".join(heads)
    table = f"<thead><tr>{head}<th></th><th class='number'>after</th></tr></thead>{''.join(lines)}"
    return f"<div class='wide'><table>{table}</table></div>"


def _problems_table(problems: Sequence[Row]) -> str:
    if not problems:
        return ""
    shown = problems[:_MOST_PROBLEMS]
    lines = "".join(f"<tr><td>{escape(str(p['name']))}</td><td>{escape(str(p['reason']))}</td></tr>" for p in shown)
    more = len(problems) - len(shown)
    rest = f"<p class='quiet'>and {more} more, in problems.jsonl</p>" if more else ""
    counted = f"{len(problems)} clip{'s' if len(problems) > 1 else ''} could not be used"
    is_open = " open" if len(problems) <= 10 else ""
    table = f"<table><thead><tr><th>clip</th><th>reason</th></tr></thead>{lines}</table>"
    return f"<details{is_open}><summary>{counted}</summary>{table}{rest}</details>"


def _settings(config: Row) -> str:
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    alone = {name: value for name, value in config.items() if name not in sections}
    tables = []
    for name, options in [*sections.items(), ("run", alone)]:
        if options:
            lines = "".join(
                f"<tr><th scope='row'>{escape(str(key))}</th><td>{escape(_value_text(value))}</td></tr>"
                for key, value in options.items()
            )
            tables.append(f"<div><h3>{escape(str(name))}</h3><table>{lines}</table></div>")
    return f"<div class='settings'>{''.join(tables)}</div>" if tables else ""


def _value_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list) and all(not isinstance(entry, dict | list) for entry in value):
        return "\n".join(str(entry) for entry in value) or "–"
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).strip()
    return str(value).lower() if isinstance(value, bool) else str(value) or "–"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
