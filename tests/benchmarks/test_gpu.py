"""The script that measures on a GPU: all of it but the GPU, on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import child, report
from benchmarks.gpu import run as command
from benchmarks.gpu.lines import append_line, newest, read_lines
from benchmarks.gpu.measures import Clock, counted_copies, spread
from benchmarks.gpu.models import open_config, random_models
from benchmarks.gpu.runs import PART_SECONDS, RUNS, choose, parts, tiny
from finetrainers.commands.completing import build_method
from finetrainers.errors import UserError
from tests.families.tiny import TINY

ASKED = {f"R{number}" for number in range(14)}
STEPS = {
    "device", "options", "size", "tokens", "flop", "executed_flop", "load", "seconds", "tokens_per_second", "mfu",
    "hfu", "memory", "host", "loss", "moved_bytes", "moved_seconds_at_25_gb", "predicted_gib", "predicted_host_gib",
}  # fmt: skip
LINE = {
    "run", "setting", "model", "size", "card_gib", "tiny", "date", "commit", "gpu", "driver", "machine", "wall_seconds"
}  # fmt: skip


def measured(name: str, folder: Path) -> dict[str, Any]:
    """What one run says of itself, in this process."""
    file = folder / "known.json"
    child.main([name, str(file), "--tiny", "--matmul-rate=1e12"])
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ["R7", "R5"])
def test_a_run_says_all_that_is_asked(name, tmp_path):
    """Streamed under a smaller card's memory; and all weights, updated in the backward pass."""
    known = measured(name, tmp_path)
    assert known.keys() == STEPS
    assert len(known["seconds"]["all"]) == 2
    assert 0 < known["seconds"]["median"] <= known["seconds"]["p95"]
    assert known["flop"] < known["executed_flop"], "blocks are computed again"
    assert known["hfu"] == pytest.approx(known["executed_flop"] / known["seconds"]["median"] / 1e12)
    assert known["predicted_gib"] > 0
    assert (known["predicted_host_gib"] > 0) == (name == "R7"), "streamed weights lie on the host"
    chosen = {
        f"{section}.{key}": value for section in known["options"] for key, value in known["options"][section].items()
    }
    assert tiny(RUNS[name]).options.items() <= chosen.items()


@pytest.mark.parametrize("name", ["R0", "R1-peft", "R13-save", "R13-wan"])
def test_other_kinds_of_runs(name, tmp_path):
    known = measured(name, tmp_path)
    if name == "R0":
        assert known["matmul_rate"] > 0 and known["copies"].keys() == {"to_device", "to_host"}
        assert known["attention"]["flash, 32 tokens, head 64"]["both"] > 0
    elif name == "R1-peft":
        assert STEPS - known.keys() == {"predicted_gib", "predicted_host_gib"}, "the plan is of our own steps"
    elif name == "R13-save":
        assert known["save"]["stall_seconds"] >= known["save"]["copying_seconds"] > 0
        assert known["save"]["steps_meanwhile"] >= 1
    else:
        assert known["clips_per_second"] > 0 and known["of_floor"] > 0


def test_the_command_appends_a_line_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """The first run is unknown to its process, which refuses it."""
    results = tmp_path / "gpu.jsonl"
    runs = [replace(RUNS["R3"], name="R99"), RUNS["R3"]]
    monkeypatch.setattr(command, "choose", lambda names: runs)
    assert command.main(["--tiny", "--results", str(results)]) == 1
    failed, done = read_lines(results)
    assert failed.keys() == LINE | {"failed"}
    assert failed["failed"].startswith("exit code 2: ") and "R99" in failed["failed"]
    assert done.keys() == LINE | STEPS
    assert (done["run"], done["tiny"], done["device"]) == ("R3", True, "cpu")
    assert done["options"]["memory"]["base_weights"] == "fp8"
    assert "R3: measured" in capsys.readouterr().out


def test_a_run_has_only_so_much_time(tmp_path):
    options = command._parse(["R3", "--tiny", "--results", str(tmp_path / "gpu.jsonl")])
    line = command.run_one(RUNS["R3"], options, seconds=0.1)
    assert line["failed"].startswith("stopped after 0 s")


def test_what_was_known_before_a_failure_is_kept(tmp_path, monkeypatch):
    options = {**RUNS["R7"].options, "memory.stream_blocks": 99}
    monkeypatch.setitem(child.RUNS, "R7", replace(RUNS["R7"], options=options))
    with pytest.raises(UserError, match="stream_blocks 99"):
        measured("R7", tmp_path)
    assert json.loads((tmp_path / "known.json").read_text())["flop"] > 0


def test_reasons():
    log = "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nException ignored in: <x>\n"
    assert command._reason(log, 1) == "exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    assert command._reason("", -9) == "exit code -9: nothing was printed"


def test_list_and_refusals(capsys, monkeypatch):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in RUNS)
    assert "goal <= 9.5 GiB, <= .13 s" in listed and "about 8 minutes" in listed
    assert command.main(["R99"]) == 2
    assert "there is no run R99" in capsys.readouterr().err
    assert command.main(["R3", "--part", "2"]) == 2
    assert "parts 1 to 1" in capsys.readouterr().err
    monkeypatch.setattr(command, "_has_cuda", lambda: False)
    assert command.main(["R3"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_runs_are_those_that_are_asked_for():
    assert {run.name.partition("-")[0] for run in RUNS.values()} == ASKED
    assert all(run.against in RUNS for run in RUNS.values() if run.against)
    assert [run.name for run in choose(["R6"])] == ["R6", "R6-fp8"]
    assert [run.name for run in choose(["R1"])] == ["R1-peft", "R1"], "not R10"
    grouped = parts(choose([]))
    assert [run for part in grouped for run in part] == list(RUNS.values())
    assert all(60 * sum(run.minutes for run in part) <= PART_SECONDS for part in grouped)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.kind in ("train", "peft", "save")])
def test_every_run_is_a_config_that_its_published_model_takes(name, tmp_path):
    """Read, completed and checked at its full size; nothing of it is built."""
    family, config, bucket = open_config(RUNS[name], tmp_path, is_tiny=False)
    assert str(bucket) == RUNS[name].size
    for option, value in RUNS[name].options.items():
        section, key = option.split(".")
        assert getattr(getattr(config, section), key) == value
    assert build_method(family, config).family is family


def test_random_models_are_what_is_loaded_from_a_file(folders, tmp_path):
    """Names, types and places; a seed fixes the numbers."""
    family, config, _ = open_config(tiny(RUNS["R10-16"]), tmp_path, is_tiny=True)
    method, device = build_method(family, config), torch.device("cpu")
    on_disk = build_method(TINY["hunyuan"].open(folders["hunyuan"]), config)
    loaded = on_disk.load(device)["transformer"].state_dict()
    made, again = (random_models(method, device=device, seed=1)["transformer"].state_dict() for _ in range(2))
    described = [{name: (t.shape, t.dtype, t.device) for name, t in state.items()} for state in (loaded, made)]
    assert described[0] == described[1]
    assert all(torch.equal(made[name], again[name]) for name in made)
    weights = torch.cat([tensor.flatten().float() for tensor in made.values()])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_copies_are_counted():
    """The meta device stands for one that is not the host; what a backward pass copies counts too."""
    weight = torch.zeros(4, requires_grad=True)
    weight.register_hook(lambda gradient: torch.zeros(8).to("meta").new_zeros(4, device="cpu"))
    with counted_copies() as copies:
        there = torch.zeros(4).to("meta")
        there.copy_(torch.ones(4))
        _ = there + 1, torch.zeros(4).copy_(torch.ones(4))
        assert copies.to_device == 2 * 16
        weight.sum().backward()
    assert (copies.to_device, copies.to_host) == (2 * 16 + 32, 0)
    copies.see(torch.zeros(2, device="meta"), torch.zeros(2))
    assert (copies.to_device, copies.to_host) == (2 * 16 + 32, 8)


def test_times_are_between_marks():
    clock = Clock(torch.device("cpu"))
    for _ in range(4):
        clock.mark()
    assert len(clock.seconds()) == 3
    assert spread([1.0, 2.0, 3.0])["median"] == 2.0
    assert spread([float(n) for n in range(21)])["p95"] == 19.0


def made_up(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    memory = {"max_allocated_gib": 12.0, "max_reserved_gib": 13.0, "taken_gib": 13.5}
    took = {"median": seconds, "p95": 2 * seconds, "all": [seconds]}
    return {"run": name, "tiny": False, "seconds": took, "memory": memory, **more}


def test_the_table_takes_the_newest(tmp_path):
    results = tmp_path / "gpu.jsonl"
    for line in (
        made_up("R6", 9.0),
        made_up("R6", 2.0, mfu=0.5, hfu=0.61, predicted_gib=11.4, predicted_error=-0.05),
        {"run": "R6", "tiny": False, "failed": "exit code 1: killed"},
        made_up("R7", 2.2, moved_seconds_at_25_gb=0.9),
        made_up("R6", 0.001) | {"tiny": True},
        {"run": "R8", "tiny": False, "failed": "exit code 1: a | b"},
    ):
        append_line(results, line)
    rows = {row.split(" | ")[0][2:]: row for row in report.table(read_lines(results))}
    assert rows.keys() == {*RUNS, "run", "---"}
    assert "| 2 s (95 %: 4), 12.0 GiB, 13.0 reserved, MFU 50%, HFU 61% | 11.4 GiB (-5.0%) |" in rows["R6"]
    assert "2.2 s (95 %: 4.4), 1.10x R6" in rows["R7"] and "0.9 s of copies at 25 GB/s" in rows["R7"]
    assert "exit code 1: a / b" in rows["R8"]
    assert rows["R9"].endswith("| not run |  |")
    assert newest(read_lines(results), "R6", tiny=True)["seconds"]["median"] == 0.001


@pytest.mark.gpu
def test_a_streamed_run_on_a_gpu(tmp_path):
    results = tmp_path / "gpu.jsonl"
    assert command.main(["R7", "--tiny", "--device", "cuda", "--results", str(results)]) == 0
    (line,) = read_lines(results)
    assert line["gpu"] and line["driver"] and line["device"] == line["gpu"]
    assert 0 < line["memory"]["max_allocated_gib"] <= line["memory"]["max_reserved_gib"]
    assert line["moved_bytes"]["to_device"] > 0
    assert line["predicted_error"] == pytest.approx(line["predicted_gib"] / line["memory"]["max_allocated_gib"] - 1)
