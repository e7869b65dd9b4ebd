"""The page of a run is rebuilt from what is on disk, and what is no run is refused."""

import json
from pathlib import Path

import pytest


def test_a_run(call, tmp_path):
    rows = [{"step": step, "epoch": 0, "loss": 1 / step, "grad_norm": 1.0, "lr": 1e-4} for step in (1, 2, 3)]
    rows = [row | {"step_time": 0.5, "data_time": 0.1, "memory_gib": 1.0} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "config.yaml").write_text("model: {path: org/model}\ntraining: {steps: 3}\n")
    answer = call("report", tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out == f"{tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    assert "org/model" in page and "of 3, epoch 0" in page
    (tmp_path / "report.html").write_text("old")
    assert call("report", tmp_path).code == 0
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize("what", ["an empty folder", "nothing", "a file", "other files"])
def test_what_is_no_run(call, tmp_path, what):
    folder: Path = tmp_path / "run"
    if what == "a file":
        folder.write_text("x")
    elif what != "nothing":
        folder.mkdir()
    if what == "other files":
        (folder / "notes.txt").touch()
    refusal = call("report", folder).refusal
    assert str(folder) in refusal and "not a run's folder" in refusal
    assert not (folder / "report.html").exists()
