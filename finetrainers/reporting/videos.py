"""Sample videos side by side over the steps, carried inside the page."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from finetrainers.folder import RunFolder, step_name, steps_in

PROMPTS_FILE = "prompts.json"
"""In a step's folder of samples: the prompt of each video, by file name."""


@dataclass(frozen=True)
class _Video:
    step: int
    path: Path
    prompt: str

    @property
    def row(self) -> tuple[str, str]:
        return self.path.name, self.prompt

    @property
    def embedded_bytes(self) -> int:
        return 4 * ((self.path.stat().st_size + 2) // 3)


def video_table(folder: RunFolder, *, budget_bytes: int) -> str:
    """Rows are prompts, columns are steps; empty when there are no samples.

    Videos are taken while the budget lasts: those of the first step, then of the newest, and so on back in time.
    What is left out is said.
    """
    by_step = {step: _videos(step, path) for step, path in steps_in(folder.samples).items()}
    steps = [step for step, videos in by_step.items() if videos]
    if not steps:
        return ""
    taken: set[Path] = set()
    for step in [steps[0], *reversed(steps[1:])]:
        for video in by_step[step]:
            if video.embedded_bytes <= budget_bytes:
                budget_bytes -= video.embedded_bytes
                taken.add(video.path)
    shown = [step for step in steps if any(video.path in taken for video in by_step[step])]
    left_out = [video for step in steps for video in by_step[step] if video.path not in taken]
    rows = dict.fromkeys(video.row for step in steps for video in by_step[step])
    head = "".join(f"<th scope='col'>step {step}</th>" for step in shown)
    body = []
    for row in rows:
        cells = [_cell(next((v for v in by_step[step] if v.row == row), None), taken) for step in shown]
        body.append(f"<tr><th scope='row'>{escape(row[1])}</th>{''.join(cells)}</tr>")
    table = f"<thead><tr><th>prompt</th>{head}</tr></thead>{''.join(body)}"
    return (
        f"<div class='wide'><table class='videos' style='--columns: {len(shown)}'>{table}</table></div>"
        + _left_out_text(left_out, shown, num_videos=len(taken) + len(left_out))
    )


def _videos(step: int, folder: Path) -> list[_Video]:
    prompts = folder / PROMPTS_FILE
    texts = json.loads(prompts.read_text(encoding="utf-8")) if prompts.is_file() else {}
    return [_Video(step, path, str(texts.get(path.name, path.stem))) for path in sorted(folder.glob("*.mp4"))]


def _cell(video: _Video | None, taken: set[Path]) -> str:
    if video is None:
        return "<td></td>"
    if video.path not in taken:
        return f"<td class='quiet'>{escape(video.path.name)}</td>"
    data = base64.b64encode(video.path.read_bytes()).decode()
    return f"<td><video controls loop muted autoplay playsinline src='data:video/mp4;base64,{data}'></video></td>"


def _left_out_text(left_out: list[_Video], shown: list[int], *, num_videos: int) -> str:
    if not left_out:
        return ""
    gone = sorted({video.step for video in left_out} - set(shown))
    places = f": {', '.join(step_name(step) for step in gone)}" if gone else ""
    counted = f"{len(left_out)} of {num_videos} videos are left out"
    return f"<p class='quiet'>{counted} to keep this page small{places}; see samples/.</p>"
