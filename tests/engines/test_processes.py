"""Several processes are started, stopped, killed and started again as one: real runs over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetrainers.folder import read_rows, steps_in
from finetrainers.hashing import file_digest
from finetrainers.training.checkpoint import find_damage
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.engines.tiny_runs import assert_close, settings

pytestmark = pytest.mark.timeout(600)


def trained(options: dict[str, Any], tmp_path: Path, output: str, *overrides: str) -> Path:
    """A run in the folder `output`; `overrides` may begin with `--nproc N`."""
    config = write_config(tmp_path / "c.yaml", **options, output=str(tmp_path / output))
    code, said = run(["train", config, *overrides], tmp_path / f"{output}.log")
    assert code == 0, said
    return tmp_path / output


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
    metrics = output / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and len(read_rows(metrics)) >= count)


def wait_for(process: subprocess.Popen[str], has_come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not has_come():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def endless(folders, clips, tmp_path, strategy: str) -> Path:
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    options["training"]["steps"] = 100_000
    options["checkpoint"]["every"] = 3
    return write_config(tmp_path / "c.yaml", **options, parallel={"strategy": strategy}, output="-")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_signal_saves_on_all_and_a_killed_process_ends_all(folders, clips, tmp_path, strategy):
    """SIGTERM to the launcher: a checkpoint, and 143. SIGKILL of one process: all end, and the run goes on exactly."""
    config, output = endless(folders, clips, tmp_path, strategy), tmp_path / "run"
    process = launch(config, output)
    wait_for_rows(process, output, 5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 143, said
    (*_, last) = steps_in(output / "checkpoints")
    assert exact_rows(output)[-1]["step"] == last
    process = launch(config, output)
    wait_for_rows(process, output, last + 5)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    assert_goes_on_exactly(config, output, tmp_path)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_killed_within_a_save(folders, clips, tmp_path, strategy):
    """SIGKILL of one process while its checkpoint is being written: the one before is whole, and the run goes on from
    it exactly."""
    config, output = endless(folders, clips, tmp_path, strategy), tmp_path / "run"
    left_half = 0
    for _ in range(6):
        if left_half == 1:
            break
        process = launch(config, output, "checkpoint.every=1")
        before = max(steps_in(output / "checkpoints"), default=0)
        deadline = time.monotonic() + 300
        victim = None
        while time.monotonic() < deadline and process.poll() is None:
            if max(steps_in(output / "checkpoints"), default=0) >= before + 2:
                victim = victim or children_of(process)[-1]
                if any((output / "checkpoints").glob(".step-*.tmp/tensors/*")):
                    os.kill(victim, signal.SIGKILL)
                    break
        process.communicate(timeout=300)
        assert process.returncode not in (0, None)
        left_half += any((output / "checkpoints").glob(".step-*.tmp"))
        for checkpoint in steps_in(output / "checkpoints").values():
            assert find_damage(checkpoint) is None
    assert left_half == 1
    assert_goes_on_exactly(config, output, tmp_path)
    assert not list((output / "checkpoints").glob(".step-*.tmp"))


def assert_goes_on_exactly(config: Path, output: Path, tmp_path: Path) -> None:
    """Started again, a run does what one does that nothing stopped."""
    (*_, last) = steps_in(output / "checkpoints")
    end = f"training.steps={last + 4}"
    for folder in (output, tmp_path / "whole"):
        code, said = run(["train", config, "--nproc", "2", f"output={folder}", end], tmp_path / "log")
        assert code == 0, said
    assert exact_rows(tmp_path / "whole") == exact_rows(output)
    assert max(Counter(row["step"] for row in exact_rows(output)).values()) == 1


def test_a_process_killed_while_it_encodes(folders, clips, tmp_path):
    """All end, what is there stays as it is, and the next start does the rest: the cache of one process."""
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    del options["data"]["cache"]
    config = write_config(tmp_path / "c.yaml", **options, output="-")
    assert run(["precompute", config, f"output={tmp_path / 'alone'}"], tmp_path / "log")[0] == 0
    cache = tmp_path / "four" / "cache"
    command = ["precompute", str(config), f"output={tmp_path / 'four'}", "--nproc", "4"]
    process = subprocess.Popen([sys.executable, "-m", "finetrainers", *command], text=True, stderr=subprocess.PIPE)
    while not list(cache.rglob("*.safetensors")) and process.poll() is None:
        time.sleep(0.001)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    code, said = run(command, tmp_path / "log")
    assert code == 0, said
    digests = [
        {path.name: file_digest(path) for path in (tmp_path / name / "cache").rglob("*.safetensors")}
        for name in ("alone", "four")
    ]
    assert digests[0] == digests[1] and 0 < len(stamps) < len(digests[0])
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


@pytest.mark.slow
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
    # It is written while the run goes on.
    wait_for(process, (output / "checkpoints" / "step-00000010").exists)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resumed from" in said
    assert_close(trained(options, tmp_path, "whole", "training.gradient_accumulation_steps=2"), output)
