"""Sources, held-out clips and what cannot be used, as a run opens them."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetrainers.config.schema import DataConfig
from finetrainers.data.dataset import Dataset, cache_folder, open_dataset
from finetrainers.data.index import FileIndex
from finetrainers.demo.clips import render_clips
from finetrainers.errors import UserError


class Phases:
    """Records what is shown of the progress: title, total and how many were counted."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    @contextmanager
    def open(self, title: str, total: int) -> Iterator["Phases"]:
        self.seen.append([title, total, 0])
        yield self

    def advance(self, n: int = 1) -> None:
        self.seen[-1][2] += n


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_clips(tmp_path_factory.mktemp("clips"), 5, num_frames=10, height=64, width=96, fps=10.0).parent


def stills(folder: Path, num: int) -> Path:
    """Captioned images of one colour each."""
    folder.mkdir()
    for number in range(num):
        Image.new("RGB", (96, 64), (number, 2 * number, 200)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"colour {number}")
    return folder


def opened(tmp_path: Path, train: Any, phases: Phases | None = None, **options: Any) -> Dataset:
    config = DataConfig(train=train, **{"buckets": ["9x64x96", "1x64x96"]} | options)
    return open_dataset(config, FileIndex(tmp_path / "files.json"), (phases or Phases()).open)


def broken(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
        (folder / name).with_suffix(".txt").write_text("a caption")
    return folder


def names(dataset: Dataset) -> tuple[list[str], list[str]]:
    return [item.name for item in dataset.train], [item.name for item in dataset.held_out]


def test_no_clips_are_held_out_of_a_few(clips, tmp_path, caplog):
    phases = Phases()
    with caplog.at_level(logging.INFO):
        dataset = opened(tmp_path, str(clips), phases)
    assert names(dataset) == (sorted(path.name for path in clips.glob("*.mp4")), [])
    assert dataset.problems == [] and dataset.num_clips == 5
    assert phases.seen == [["looking at clips", 5, 5]]
    assert "no clips are held out: data.validation is not set, and there are fewer than 40" in caplog.text


@pytest.mark.parametrize(("num", "num_held_out"), [(39, range(1)), (40, range(1, 9)), (120, range(1, 16))])
def test_from_forty_clips_up_some_are_held_out(tmp_path, num, num_held_out):
    """5 % of 40 is 2, of 120 is 6; five standard deviations above that are 9 and 18."""
    dataset = opened(tmp_path, str(stills(tmp_path / "stills", num)))
    assert len(dataset.held_out) in num_held_out
    assert len(dataset.train) + len(dataset.held_out) == num


def test_forty_copies_are_one_clip(tmp_path):
    folder = stills(tmp_path / "stills", 40)
    for path in folder.glob("*.png"):
        if path.stem != "000":
            shutil.copy(folder / "000.png", path)
    assert opened(tmp_path, str(folder)).held_out == []


def test_a_share(clips, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        dataset = opened(tmp_path, str(clips), validation=0.4)
    train, held_out = names(dataset)
    assert train and held_out and not set(train) & set(held_out) and len(train + held_out) == 5
    assert f"held out for validation: {len(held_out)} of 5 clips ({', '.join(held_out)})" in caplog.text


def test_a_path_of_held_out_clips(clips, tmp_path):
    folder = stills(tmp_path / "stills", 3)
    phases = Phases()
    dataset = opened(tmp_path, str(clips), phases, validation=str(folder))
    assert names(dataset)[1] == ["000.png", "001.png", "002.png"]
    assert len(dataset.train) == 5 and dataset.num_clips == 8
    assert phases.seen == [["looking at clips", 5, 5], ["looking at clips", 3, 3]]
    with pytest.raises(UserError, match="no such file or folder"):
        opened(tmp_path, str(clips), validation=str(tmp_path / "absent"))


def test_sources_are_read_one_after_the_other(clips, tmp_path):
    folder = stills(tmp_path / "stills", 2)
    dataset = opened(tmp_path, [str(folder), {"path": str(clips)}])
    assert names(dataset)[0] == ["000.png", "001.png", *sorted(path.name for path in clips.glob("*.mp4"))]


def test_broken_clips_are_named_and_the_rest_is_used(tmp_path, caplog):
    folder = broken(stills(tmp_path / "stills", 3), "b.mp4", "a.mp4")
    held_out = broken(stills(tmp_path / "held-out", 2), "c.mp4")
    dataset = opened(tmp_path, str(folder), validation=str(held_out))
    assert (len(dataset.train), len(dataset.held_out), dataset.num_clips) == (3, 2, 8)
    assert [problem.name for problem in dataset.problems] == ["a.mp4", "b.mp4", "c.mp4"]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"left out {name}.mp4: is empty (0 bytes)" for name in "abc"]


@pytest.mark.parametrize("where", ["train", "validation"])
def test_strict_stops_naming_each(tmp_path, where):
    folders = {"train": stills(tmp_path / "train", 3), "validation": stills(tmp_path / "validation", 2)}
    broken(folders[where], "b.mp4", "a.mp4")
    with pytest.raises(UserError) as caught:
        opened(tmp_path, str(folders["train"]), validation=str(folders["validation"]), strict=True)
    expected = "a.mp4: is empty (0 bytes); b.mp4: is empty (0 bytes)"
    assert str(caught.value) == f"2 of 7 clips cannot be used, and data.strict is set: {expected}"


def test_strict_passes_what_is_whole(clips, tmp_path):
    assert len(opened(tmp_path, str(clips), strict=True).train) == 5


def test_nothing_usable_names_the_reasons(tmp_path):
    (tmp_path / "clips").mkdir()
    folder = broken(tmp_path / "clips", *(f"{number}.mp4" for number in range(5)))
    with pytest.raises(UserError) as caught:
        opened(tmp_path, str(folder))
    reasons = "; ".join(f"{number}.mp4: is empty (0 bytes)" for number in range(3))
    assert str(caught.value) == f"data.train holds no clip that can be used: {reasons}; and 2 more"


SHARES = [({}, True), ({"first": 0.5}, True), ({"first": 0.5, "none": 0.5}, True), ({"first": 1.0}, False)]


@pytest.mark.parametrize(("conditions", "are_used"), [*SHARES, ({"first": 0.6, "first_last": 0.4}, False)])
def test_a_still_is_left_out_where_a_frame_is_always_given(clips, tmp_path, conditions, are_used):
    images = stills(tmp_path / "stills", 2)
    dataset = opened(tmp_path, [str(clips), str(images)], conditions=conditions)
    assert len(dataset.train) == (7 if are_used else 5)
    assert [problem.name for problem in dataset.problems] == ([] if are_used else ["000.png", "001.png"])
    assert all("nothing is left to learn" in problem.reason for problem in dataset.problems)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(DataConfig(train="x"), tmp_path / "run" / "cache") == tmp_path / "run" / "cache"
    assert cache_folder(DataConfig(train="x", cache="~/cache"), tmp_path / "run") == tmp_path / "cache"
