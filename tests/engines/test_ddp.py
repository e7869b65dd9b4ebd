"""Several processes give the numbers of one: real runs over gloo, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetrainers.demo.clips import render_clips
from finetrainers.folder import read_rows, steps_in
from finetrainers.hashing import file_digest
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.families.tiny import TINY

# Two processes and more each import torch, on few cores.
pytestmark = pytest.mark.timeout(600)
ROWS = ["ltx-0.9.5-i2v", "cogvideox-5b", "hunyuan", "wan-2.2-a14b"]
METHODS = ["method={name: lora, rank: 4, alpha: 8, dropout: 0.1}", "method={name: full}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Written(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = TINY[name].write(tmp_path_factory.mktemp("models") / name)
            return self[name]

    return Written()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven, so that the last batches of an epoch are smaller, and processes have unequal ones."""
    folder = tmp_path_factory.mktemp("clips")
    return render_clips(folder, 7, num_frames=22, height=64, width=96, fps=16.0).parent


def settings(name: str, model: Path, clips: Path, tmp_path: Path) -> dict[str, Any]:
    row = TINY[name]
    given = {} if row.task == "text-to-video" else {"conditions": {row.conditions[0]: 0.5}}
    return {
        "model": {"path": str(model), "task": row.task},
        "data": {"train": str(clips), "buckets": [row.bucket], "cache": str(tmp_path / "cache"), **given},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 20, "batch_size": 2, "precision": "fp32", "max_grad_norm": 0.01},
        "validation": {"every": 0},
        "checkpoint": {"every": 10},
    }


def trained(options: dict[str, Any], tmp_path: Path, output: str, *overrides: str) -> Path:
    """A run in the folder `output`; `overrides` may begin with `--nproc N`."""
    config = write_config(tmp_path / "c.yaml", **options, output=str(tmp_path / output))
    code, said = run(["train", config, *overrides], tmp_path / f"{output}.log")
    assert code == 0, said
    return tmp_path / output


def assert_close(one: Path, other: Path) -> None:
    """Losses, gradient norms, held-out losses and exported weights to 1e-5."""
    ours, theirs = exact_rows(one), exact_rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for left, right in zip(ours, theirs, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6), left["step"]
    files = [sorted((run / "weights" / "latest").rglob("*.safetensors")) for run in (one, other)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] != []
    for path, twin in zip(*files, strict=True):
        left, right = load_file(path), load_file(twin)
        for key in left.keys() | right.keys():
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=["lora", "full"])
@pytest.mark.parametrize("name", ROWS)
def test_two_processes_are_one_that_accumulates(folders, clips, tmp_path, name, method):
    """Twenty steps with clipping at work, uneven last batches and epochs that end within a step."""
    options = settings(name, folders[name], clips, tmp_path)
    alone = trained(options, tmp_path, "alone", method, "training.gradient_accumulation_steps=4")
    both = trained(options, tmp_path, "both", "--nproc", "2", method, "training.gradient_accumulation_steps=2")
    rows = [row for row in exact_rows(alone) if "loss" in row]
    assert min(row["grad_norm"] for row in rows) > 0.01, "clipping must be at work"
    assert_close(alone, both)
    assert "ddp on 2 processes" in (tmp_path / "both.log").read_text()


def test_four_processes_save_and_others_go_on(folders, clips, tmp_path):
    """Saved on four, resumed on two and on one: the position in the data and every number are kept."""
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    options["data"]["validation"] = 0.3
    options["validation"] = {"every": 5, "num_inference_steps": 2, "num_videos": 1}
    whole = trained(options, tmp_path, "whole", "training.gradient_accumulation_steps=4")
    parts = "training.gradient_accumulation_steps=%d"
    trained(options, tmp_path, "parts", "--nproc", "4", parts % 1, "training.steps=7")
    trained(options, tmp_path, "parts", "--nproc", "2", parts % 2, "training.steps=13")
    assert_close(whole, trained(options, tmp_path, "parts", parts % 4))
    assert "resumed from" in (tmp_path / "parts.log").read_text()
    samples = steps_in(tmp_path / "parts" / "samples")
    assert list(samples) == [0, 5, 10, 15, 20]
    states = {json.loads((path / "state.json").read_text())["train"]["samples"] for path in (
        list(steps_in(whole / "checkpoints").values())[-1],
        list(steps_in(tmp_path / "parts" / "checkpoints").values())[-1],
    )}  # fmt: skip
    assert len(states) == 1


def test_encoding_is_shared_out_and_the_same(folders, clips, tmp_path):
    """The very same files as one process makes, and each clip and caption by one process alone."""
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    del options["data"]["cache"]
    caches = []
    for output, processes in (("alone", ()), ("four", ("--nproc", "4"))):
        config = write_config(tmp_path / "c.yaml", **options, output=str(tmp_path / output))
        code, said = run(["precompute", config, *processes], tmp_path / "log")
        assert code == 0, said
        assert said.count("samples are encoded") == 1, "one process speaks"
        cache = tmp_path / output / "cache"
        caches.append({path.name: file_digest(path) for path in cache.rglob("*.safetensors")})
        known = json.loads((cache / "whole.json").read_text())
        assert len(known) == len(caches[-1])
    assert caches[0] == caches[1]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "four").rglob("*.safetensors")}
    assert run(["precompute", config, "--nproc", "2"], tmp_path / "log")[0] == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "four").rglob("*.safetensors")}


def test_a_mistake_is_said_once(folders, clips, tmp_path):
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    config = write_config(tmp_path / "c.yaml", **options, output=str(tmp_path / "run"))
    code, said = run(["train", config, "--nproc", "2", "method.target_modules=nothing"], tmp_path / "log")
    assert code == 2, said
    assert said.count("matches no linear layer") == 1 and "Traceback" not in said, said


def launch(config: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    arguments = ["train", str(config), "--nproc", "2", f"output={output}", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "finetrainers", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_rows(process: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(read_rows(output / "metrics.jsonl")) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_saves_on_all_and_a_killed_process_ends_all(folders, clips, tmp_path):
    """SIGTERM to the launcher: a checkpoint, and 143. SIGKILL of one process: all end, and the run goes on exactly."""
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    options["training"]["steps"] = 100_000
    options["checkpoint"]["every"] = 3
    config, output = write_config(tmp_path / "c.yaml", **options, output="-"), tmp_path / "run"
    process = launch(config, output)
    wait_for_rows(process, output, 5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    (*_, last) = steps_in(output / "checkpoints")
    assert exact_rows(output)[-1]["step"] == last
    process = launch(config, output)
    wait_for_rows(process, output, last + 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    (*_, last) = steps_in(output / "checkpoints")
    end = f"training.steps={last + 4}"
    code, said = run(["train", config, "--nproc", "2", f"output={output}", end], tmp_path / "log")
    assert code == 0, said
    whole = tmp_path / "whole"
    code, said = run(["train", config, "--nproc", "2", f"output={whole}", end], tmp_path / "log")
    assert code == 0, said
    assert exact_rows(whole) == exact_rows(output)
    assert max(Counter(row["step"] for row in exact_rows(output)).values()) == 1


def test_torchrun_restarts_from_the_last_checkpoint_by_itself(folders, clips, tmp_path):
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    options["training"]["steps"] = 60
    options["checkpoint"]["every"] = 10
    config, output = write_config(tmp_path / "c.yaml", **options, output=str(tmp_path / "run")), tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "finetrainers", "train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_rows(process, output, 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resumed from" in said
    assert_close(trained(options, tmp_path, "whole", "training.gradient_accumulation_steps=2"), output)
