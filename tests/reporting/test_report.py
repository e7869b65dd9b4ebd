"""The report of a synthetic run whose captions and file names are hostile."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetrainers.errors import UserError
from finetrainers.folder import RunFolder, step_name
from finetrainers.reporting.charts import number_text, running_median, smoothed, thinned, ticks
from finetrainers.reporting.report import write_report

HOSTILE = """</td></video><script>alert('1')</script><img src="http://evil.example/x" onerror=alert(2)>$title&amp;'"""
PAGE_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "section",
    "div",
    "p",
    "b",
    "i",
    "span",
}
PAGE_TAGS |= {"h1", "h2", "h3", "dl", "dt", "dd", "table", "thead", "tr", "th", "td", "details", "summary"}
PAGE_TAGS |= {"figure", "figcaption", "svg", "line", "text", "polyline", "circle", "video"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def values(self, tag: str, name: str) -> list[str | None]:
        return [value for found, attribute, value in self.attributes if (found, attribute) == (tag, name)]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(step: int) -> dict[str, Any]:
    numbers = {"loss": 1 + 1 / step, "grad_norm": 2.0, "lr": 2e-4, "step_time": 3.0, "memory_gib": 7.5}
    return {"step": step, "epoch": step // 50} | numbers


def memory_row(phase: str, peak: float, **more: float) -> dict[str, Any]:
    return {"phase": phase, "allocated_gib": 1.0, "peak_gib": peak, **more, "seconds": 65.0}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A finished run of 100 steps."""
    folder = RunFolder(tmp_path / "crush <u>& clay")
    settings = {"model": {"path": "tiny", "task": HOSTILE, "revision": None}, "data": {"train": [{"path": "./clips"}]}}
    settings |= {"training": {"steps": 100, "gradient_checkpointing": True}, "output": str(folder.root)}
    folder.root.mkdir()
    folder.config.write_text(yaml.safe_dump(settings, allow_unicode=True))
    validations = [{"step": step, "validation_loss": loss} for step, loss in [(0, 2.0), (50, 0.5), (100, 1.5)]]
    write_rows(folder.metrics, [*(step_row(step) for step in range(1, 101)), *validations])
    write_rows(folder.memory, [memory_row("start", 99.0), memory_row("start", 1.0), memory_row(HOSTILE, 9.25)])
    write_rows(folder.problems, [{"name": HOSTILE, "reason": HOSTILE}, {"name": "b\udce9.mov", "reason": "cut short"}])
    for step in (0, 50, 100):
        write_samples(folder, step, {f"{n:02d}.mp4": prompt for n, prompt in enumerate([HOSTILE, "a second prompt"])})
    return folder


def write_samples(folder: RunFolder, step: int, prompts: dict[str, str], *, num_bytes: int = 300) -> None:
    samples = folder.samples / step_name(step)
    samples.mkdir(parents=True, exist_ok=True)
    for name in prompts:
        (samples / name).write_bytes(f"step {step} {name}".encode().ljust(num_bytes))
    (samples / "prompts.json").write_text(json.dumps(prompts))


def test_nothing_hostile_gets_out_of_its_place_and_nothing_is_fetched(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    assert page.open == []
    assert set(page.tags) <= PAGE_TAGS
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in {"href", "srcset", "action"}]
    sources = [value for _, name, value in page.attributes if name == "src"]
    assert sources and all(source and source.startswith("data:video/mp4;base64,") for source in sources)
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert not re.search(r"url\(|@import|http", style)
    (policy,) = [value for value in page.values("meta", "content") if value and "default-src" in value]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; media-src data:"
    # The task, the phase, the clip, its reason and the prompt, word for word.
    assert page.texts.count(HOSTILE) >= 4
    assert "http://evil.example" not in str(page.attributes)


def test_it_shows_the_run_in_numbers_that_were_derived(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    facts = dict(zip(between(page, "dt"), between(page, "dd"), strict=True))
    assert page.texts.count("crush <u>& clay") == 2, "title and heading"
    loss = smoothed([(step, 1 + 1 / step) for step in range(1, 101)], decay=0.95)[-1][1]
    assert facts == {
        "Steps": "100",
        "Time": "5 min",
        "Loss": f"{loss:.4g}",
        "Best validation loss": "0.5",
        "Last validation loss": "1.5",
        # The 99 GiB are of the run before it was resumed.
        "Peak memory": "9.25 GiB",
    }
    for note in ("of 100, epoch 2", "3 s per step", "at step 50", "-25.0 % since step 0"):
        assert note in page.texts
    for title in ("Loss, smoothed", "Validation loss", "Gradient norm, median", "Learning rate", "Peak memory, GiB"):
        assert title in page.texts
    assert [text for text in page.texts if text.startswith("step 50:")] == ["step 50: 0.5"]
    for setting in ("[{path: ./clips}]", "true", "–", str(folder.root)):
        assert setting in page.texts


def between(page: Page, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", page.source)


def test_videos_stand_in_rows_by_prompt_and_columns_by_step(folder: RunFolder) -> None:
    page = Page(write_report(folder))
    videos = [base64.b64decode((source or "").split(",")[1]).decode().strip() for source in page.values("video", "src")]
    assert videos == [f"step {step} {name}" for name in ("00.mp4", "01.mp4") for step in (0, 50, 100)]
    assert [text for text in page.texts if re.fullmatch(r"step \d+", text)] == ["step 0", "step 50", "step 100"]
    assert "left out" not in page.text


@pytest.mark.parametrize(
    ("budget", "shown", "said"),
    [
        # A video of 300 bytes is 400 in the page.
        (6 * 400, [0, 50, 100], None),
        (6 * 400 - 1, [0, 50, 100], "1 of 6 videos are left out to keep this page small; see samples/."),
        (4 * 400, [0, 100], "2 of 6 videos are left out to keep this page small: step-00000050; see samples/."),
        (
            2 * 400,
            [0],
            "4 of 6 videos are left out to keep this page small: step-00000050, step-00000100; see samples/.",
        ),
    ],
)
def test_the_first_and_the_newest_videos_are_kept(
    folder: RunFolder, budget: int, shown: list[int], said: str | None
) -> None:
    page = Page(write_report(folder, video_budget_bytes=budget))
    assert len(page.values("video", "src")) == min(6, budget // 400)
    assert [text for text in page.texts if re.fullmatch(r"step \d+", text)] == [f"step {step}" for step in shown]
    assert [text for text in page.texts if "left out" in text] == ([said] if said else [])


def test_a_prompt_that_changed_gets_a_row_of_its_own(folder: RunFolder) -> None:
    write_samples(folder, 150, {"00.mp4": "a third prompt"})
    (folder.samples / step_name(150) / "extra.mp4").write_bytes(b"x")
    page = Page(write_report(folder))
    rows = re.findall(r"<th scope='row'>(.*?)</th>", page.source)
    assert [row for row in rows if row in {"a second prompt", "a third prompt", "extra"}] == [
        "a second prompt",
        "a third prompt",
        "extra",
    ]


@pytest.mark.parametrize("present", ["config", "metrics"])
def test_an_unfinished_run_has_a_report_too(folder: RunFolder, present: str) -> None:
    for name in ("config", "metrics", "memory", "problems"):
        if name != present:
            getattr(folder, name).unlink()
    page = Page(write_report(folder))
    assert page.open == []
    assert between(page, "h2") == {"config": ["Samples", "Settings"], "metrics": ["Curves", "Samples"]}[present]


def test_without_a_run_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run's folder: it has neither config\.yaml nor metrics\.jsonl"):
        write_report(RunFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_many_problems_are_counted_and_not_all_listed(folder: RunFolder) -> None:
    write_rows(folder.problems, [{"name": f"{n}.mp4", "reason": "too short"} for n in range(250)])
    page = Page(write_report(folder))
    assert page.texts.count("too short") == 200
    assert "250 clips could not be used" in page.texts and "and 50 more, in problems.jsonl" in page.texts


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.87, 4, [0.2, 0.4, 0.6, 0.8]),
        (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]),
        (1e-6, 2e-4, 4, [5e-5, 1e-4, 1.5e-4, 2e-4]),
        (7, 7, 4, [7]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, count: int, expected: list[float]) -> None:
    assert ticks(low, high, count=count) == pytest.approx(expected, abs=1e-12)


def test_a_running_median_passes_over_what_stands_out() -> None:
    points = [(step, value) for step, value in enumerate([1.0, 3.0, 900.0, 2.0, 2.0, 5.0])]
    # Windows 1 | 1 3 | 1 3 900 | 3 900 2 | 900 2 2 | 2 2 5; of two values the upper one.
    assert running_median(points, width=3) == [(0, 1.0), (1, 3.0), (2, 3.0), (3, 3.0), (4, 2.0), (5, 2.0)]


def test_smoothing_has_no_bias_at_the_start() -> None:
    # (0.5 * 1 + 4) / (0.5 + 1) = 3
    assert smoothed([(1, 1.0), (2, 4.0)], decay=0.5) == [(1, 1.0), (2, 3.0)]


def test_thinning_keeps_every_peak() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(10_000)]
    points[4321] = (4321.0, 100.0)
    points[7890] = (7890.0, -100.0)
    thin = thinned(points, most=800)
    assert len(thin) <= 800 and thin == sorted(thin)
    assert points[4321] in thin and points[7890] in thin
    assert thinned(points[:800], most=800) == points[:800]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.12345, "0.1235"),
        (2e-4, "2e-4"),
        (1.25e-5, "1.25e-5"),
        (12345.6, "12,346"),
        (3e7, "3e7"),
        (-2, "-2"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text


def test_the_memory_table_has_the_parts_where_rows_have_them(folder: RunFolder) -> None:
    parts = {"weights_gib": 3.5, "gradients_gib": 0.25, "optimizer_gib": 0.75}
    assert "optimizer, GiB" not in Page(write_report(folder)).texts
    write_rows(folder.memory, [memory_row("start", 1.0), memory_row("end", 8.0, **parts)])
    page = Page(write_report(folder))
    table = page.source[
        page.source.index("phase ends") : page.source.index("</table>", page.source.index("phase ends"))
    ]
    names = ["held", "weights", "gradients", "optimizer", "peak"]
    assert re.findall(r"class='number'>([a-z]+), GiB", table) == names
    start, end = (re.findall(r"<td class='number'>(.*?)</td>", row) for row in table.split("<tr>")[1:])
    assert start == ["1.00", "", "", "", "1.00", "1 min"]
    assert end == ["1.00", "3.50", "0.25", "0.75", "8.00", "1 min"]
    write_rows(folder.memory, [memory_row("end", 8.0, reserved_gib=9.0)])
    assert "reserved, GiB" in Page(write_report(folder)).source
