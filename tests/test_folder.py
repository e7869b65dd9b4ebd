"""Names on disk stay in their folder, and a file is there whole or not at all."""

import json
import os
import re
import stat
from pathlib import Path

import pytest

from finetrainers import folder as module
from finetrainers.folder import RunFolder, old_steps, read_rows, slug, step_name, steps_in, write_atomically

SLUGS = [
    ("A red circle moves!", "a-red-circle-moves"),
    ("../../etc/passwd", "etc-passwd"),
    ("..", "prompt"),
    ("/etc/shadow", "etc-shadow"),
    ("C:\\Windows\\x", "c-windows-x"),
    ("a\0b\nc", "a-b-c"),
    ("", "prompt"),
    ("   ", "prompt"),
    ("猫が走る", "prompt"),
    ("Ein Bär läuft", "ein-b-r-l-uft"),
    ("-rf *", "rf"),
    ("~root $HOME `id`", "root-home-id"),
    ("x" * 10_000, "x" * 48),
    ("ab " * 5_000, "ab-" * 15 + "ab"),
    ("x" * 47 + " y", "x" * 47),
]


@pytest.mark.parametrize(("prompt", "expected"), SLUGS)
def test_a_slug_never_leaves_its_folder(tmp_path, prompt, expected):
    assert slug(prompt) == expected
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", slug(prompt)) and len(slug(prompt)) <= 48
    file = tmp_path / f"00-{slug(prompt)}.mp4"
    file.touch()
    assert file.resolve().parent == tmp_path.resolve()


def test_steps_in(tmp_path):
    assert steps_in(tmp_path / "absent") == {}
    steps = [100_000_000, 3, 20, 100]
    for step in steps:
        (tmp_path / step_name(step)).mkdir()
    for other in (".step-00000007.tmp", "step-7", "step-00000009.tmp", "latest", "step-0000000x", "xstep-00000005"):
        (tmp_path / other).mkdir()
    found = steps_in(tmp_path)
    assert list(found.items()) == [(step, tmp_path / step_name(step)) for step in sorted(steps)]
    assert step_name(20) == "step-00000020" and sorted(map(step_name, (9, 10, 99_999))) == list(
        map(step_name, (9, 10, 99_999))
    )


OLD = [
    ([1, 2, 3], 1, 3, [1, 2]),
    ([1, 2, 3], 2, 3, [1]),
    ([1, 2, 3], 3, 3, []),
    ([3], 1, 3, []),
    ([7, 8, 9, 4], 1, 4, [7, 8, 9]),
    ([7, 8, 9, 4], 2, 4, [7, 8]),
    ([2, 4, 6, 5], 2, 5, [2, 4]),
]


@pytest.mark.parametrize(("steps", "keep", "current", "expected"), OLD)
def test_old_steps_are_never_the_current_one(tmp_path, steps, keep, current, expected):
    for step in steps:
        (tmp_path / step_name(step)).mkdir()
    assert old_steps(tmp_path, keep=keep, current=current) == [tmp_path / step_name(step) for step in expected]


def test_asking_for_names_creates_nothing(tmp_path):
    run = RunFolder(tmp_path / "run")
    names = [name for name in vars(RunFolder) if not name.startswith("_")]
    paths = [getattr(run, name) for name in names]
    assert len(set(paths)) == len(names) == 9
    assert all(path.parent == run.root for path in paths)
    assert not run.root.exists()


@pytest.mark.parametrize("content", ["text with é", b"\0bytes\xff", "", "x" * 300_000])
def test_write_atomically(tmp_path, content):
    path = tmp_path / "new" / "folder" / "file.json"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
        assert list(path.parent.iterdir()) == [path]


def test_a_written_file_may_be_read_as_the_umask_allows(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "x")
        assert os.umask(0o027) == 0o027, "the umask is left as it was"
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", ["old content", None])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_fails_in_the_middle(tmp_path, monkeypatch, error, old, moment):
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((module.os, "fsync") if moment == "fsync" else (Path, "replace")), fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new content")
    assert list(tmp_path.iterdir()) == ([path] if old else [])
    assert old is None or path.read_text() == old


def test_the_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut the name must not stand over an empty file."""
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(module.os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda old, new: (events.append("named"), replace(old, new))[1])
    write_atomically(tmp_path / "file", "12345")
    assert events == [5, "named"]


ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "text": "é\u2028x"}]
FILES = [
    ("", 0),
    ("{0}\n{1}\n", 2),
    ("{0}\n{1}", 2),
    ('{0}\n{1}\n{{"step": 3, "lo', 2),
    ('{0}\n{{"st\n{1}\n', 2),
    ("{0}\n\n{1}\n", 2),
]


@pytest.mark.parametrize(("content", "expected"), FILES)
def test_read_rows_leaves_out_a_torn_line(tmp_path, content, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content.format(*map(json.dumps, ROWS)))
    assert read_rows(path) == ROWS[:expected]


def test_read_rows_of_any_length(tmp_path):
    """Wherever a kill cuts the file, what is read is a beginning of it."""
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    whole = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    for length in range(len(whole) + 1):
        path.write_text(whole[:length])
        rows = read_rows(path)
        assert rows == ROWS[: len(rows)] and len(rows) >= whole[:length].count("\n")
