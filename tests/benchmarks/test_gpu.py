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
from benchmarks.gpu.computed import VENDOR_PEAK, complete_line, run_of
from benchmarks.gpu.lines import append_line, newest, read_lines
from benchmarks.gpu.measures import counted_copies
from benchmarks.gpu.models import open_config, random_models
from benchmarks.gpu.runs import PART_SECONDS, RUNS, choose, parts, tiny
from finetrainers.commands.completing import build_method
from finetrainers.config.schema import RunConfig
from finetrainers.errors import UserError
from tests.families.tiny import TINY

ASKED = {f"R{number}" for number in range(14)}
STEPS = {
    "device", "options", "size", "tokens", "load", "seconds", "tokens_per_second", "memory", "host", "loss",
    "moved_bytes", "moved_seconds_at_25_gb", "warm_up_seconds",
}  # fmt: skip
PREDICTED = {"predicted_gib", "predicted_host_gib"}
COMPUTED = {"flop", "executed_flop", "mfu", "hfu"} | PREDICTED
LINE = {
    "run", "setting", "model", "size", "card_gib", "tiny", "date", "commit", "gpu", "driver", "machine", "wall_seconds"
}  # fmt: skip


def measured(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """What one run says of itself, in this process."""
    file = folder / "known.json"
    child.main([name, str(file), "--tiny", *more])
    return json.loads(file.read_text())


def line_of(name: str, **known: Any) -> dict[str, Any]:
    """A line of the results file, as far as completing it asks."""
    return {"run": name, "tiny": True, "model": RUNS[name].model, **known}


def options_of(config: RunConfig) -> dict[str, Any]:
    """As the process of a run writes them."""
    return config.model_dump(mode="json", include={"method", "optimizer", "training", "memory"})


LIMITS = [line_of("R0", matmul_rate=2e12), line_of("R0", matmul_rate=1e12), line_of("R0", failed="", matmul_rate=3e12)]
"""The second is the newest that did not fail."""


@pytest.mark.parametrize("name", ["R7", "R5"])
def test_a_run_says_all_that_is_asked(name, tmp_path):
    """Streamed under a smaller card's memory; and all weights, updated in the backward pass."""
    known = measured(name, tmp_path)
    assert known.keys() == STEPS
    assert len(known["seconds"]["all"]) == 2
    assert 0 < known["seconds"]["median"] <= known["seconds"]["p95"]
    line = complete_line(line_of(name, **known), LIMITS)
    assert line.keys() == line_of(name).keys() | STEPS | COMPUTED
    assert line["flop"] < line["executed_flop"], "blocks are computed again"
    assert line["mfu"] == pytest.approx(line["flop"] / line["seconds"]["median"] / VENDOR_PEAK)
    assert line["hfu"] == pytest.approx(line["executed_flop"] / line["seconds"]["median"] / 1e12)
    assert line["predicted_gib"] > 0
    assert (line["predicted_host_gib"] > 0) == (name == "R7"), "streamed weights lie on the host"
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
        assert known.keys() == STEPS
    elif name == "R13-save":
        assert known["save"]["stall_seconds"] >= known["save"]["copying_seconds"] > 0
        assert known["save"]["steps_meanwhile"] >= 1
    else:
        assert known["clips_per_second"] > 0 and known["of_floor"] > 0
    line = line_of(name, **known)
    computed = {"R1-peft": COMPUTED - PREDICTED, "R13-save": COMPUTED}.get(name, set())
    assert complete_line(line, LIMITS).keys() - line.keys() == computed, "the plan is of our own steps"


def test_as_many_steps_are_timed_as_asked(tmp_path):
    assert len(measured("R2", tmp_path, "--timed=3")["seconds"]["all"]) == 3


def test_what_is_computed_is_of_the_line(tmp_path):
    """Of its options, not of those that the run has by now; what is complete, or not measured, stays the same."""
    _, config, bucket = open_config(tiny(RUNS["R2"]), tmp_path, is_tiny=True)
    options = options_of(config)
    unmeasured = line_of("R2", options=options, size=str(bucket))
    line = unmeasured | {"seconds": {"median": 0.5}, "memory": {"max_allocated_gib": 2.0}}
    again = complete_line(line, [])
    assert again["hfu"] is None, "R0 was not measured"
    assert again["predicted_error"] == again["predicted_gib"] / 2.0 - 1
    options["training"]["gradient_checkpointing"] = "none"
    kept = complete_line(line, [])
    assert kept["executed_flop"] == kept["flop"] == again["flop"] < again["executed_flop"]
    assert complete_line(line | {"failed": ""}, []).keys() == kept.keys() | {"failed"}
    for same in (kept, unmeasured | {"failed": ""}, line | {"run": "R99"}):
        assert complete_line(same, LIMITS) is same


def test_the_command_appends_a_line_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """The first run is unknown to its process, which refuses it."""
    results = tmp_path / "gpu.jsonl"
    runs = [replace(RUNS["R3"], name="R99"), RUNS["R3"]]
    monkeypatch.setattr(command, "choose", lambda names: runs)
    assert command.main(["--tiny", "--results", str(results)]) == 1
    failed, done = read_lines(results)
    assert failed.keys() == LINE | {"failed"}
    assert failed["failed"].startswith("exit code 2: ") and "R99" in failed["failed"]
    assert done.keys() == LINE | STEPS | COMPUTED
    assert (done["run"], done["tiny"], done["device"]) == ("R3", True, "cpu")
    assert done["options"]["memory"]["base_weights"] == "fp8"
    assert "R3: measured" in capsys.readouterr().out


def test_what_was_only_measured_is_completed_later(tmp_path, capsys):
    """To what the command says without `--measure-only`; other lines stay, as does what cannot be completed."""
    results = tmp_path / "gpu.jsonl"
    assert command.main(["R3", "--tiny", "--measure-only", "--timed", "3", "--results", str(results)]) == 0
    (before,) = read_lines(results)
    assert before.keys() == LINE | STEPS
    assert len(before["seconds"]["all"]) == 3
    others = [line_of("R8", failed="killed"), line_of("R0", matmul_rate=1e12)]
    for line in others:
        append_line(results, line)
    assert command.main(["--complete", "--results", str(results)]) == 0
    assert "R3: completed in" in capsys.readouterr().out
    completed, *rest = read_lines(results)
    assert completed.keys() == LINE | STEPS | COMPUTED and before.items() <= completed.items()
    assert completed["hfu"] > 0 and rest == others
    text = results.read_text()
    append_line(results, before | {"options": {"memory": {"no_such_option": 1}}})
    assert command.main(["--complete", "--results", str(results)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("line 4, R3: ") and "no_such_option" in said.err
    assert results.read_text().startswith(text) and len(read_lines(results)) == 4
    assert list(tmp_path.iterdir()) == [results], "nothing is left beside it"


def test_what_was_measured_is_kept_when_it_cannot_be_completed(tmp_path, monkeypatch):
    def broken(line: object, lines: object) -> None:
        raise RuntimeError("no such thing")

    results = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(command, "run_one", lambda run, options, *, seconds: {"run": run.name, "wall_seconds": 1.0})
    monkeypatch.setattr("benchmarks.gpu.computed.complete_line", broken)
    with pytest.raises(RuntimeError, match="no such thing"):
        command.main(["R3", "--tiny", "--results", str(results)])
    assert [line["run"] for line in read_lines(results)] == ["R3"]


def test_a_run_has_only_so_much_time(tmp_path):
    options = command._parse(["R3", "--tiny", "--results", str(tmp_path / "gpu.jsonl")])
    line = command.run_one(RUNS["R3"], options, seconds=0.1)
    assert line["failed"].startswith("stopped after 0 s")


def test_what_was_known_before_a_failure_is_kept(tmp_path, monkeypatch):
    options = {**RUNS["R7"].options, "memory.stream_blocks": 99}
    monkeypatch.setitem(child.RUNS, "R7", replace(RUNS["R7"], options=options))
    with pytest.raises(UserError, match="stream_blocks 99"):
        measured("R7", tmp_path)
    assert json.loads((tmp_path / "known.json").read_text())["tokens"] > 0


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
    assert command.main(["R3", "--tiny", "--timed", "1"]) == 2
    assert "2 steps or more" in capsys.readouterr().err


def test_refusals_to_complete(tmp_path, capsys):
    results = tmp_path / "gpu.jsonl"
    for more, reason in (([], f"no file {results}"), (["R3"], "leave out NAME"), (["--part", "1"], "and --part")):
        assert command.main(["--complete", "--results", str(results), *more]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ") and reason in said
    assert not results.exists()


def test_the_runs_are_those_that_are_asked_for():
    assert {run.name.partition("-")[0] for run in RUNS.values()} == ASKED
    assert all(run.against in RUNS for run in RUNS.values() if run.against)
    assert [run.name for run in choose(["R6"])] == ["R6", "R6-eager", "R6-fp8"]
    assert [run.name for run in choose(["R1"])] == ["R1-peft", "R1", "R1-eager", "R1-graphs"], "not R10"
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
    line = line_of(name, options=options_of(config), size=str(bucket))
    assert open_config(run_of(line), tmp_path, is_tiny=False)[1] == config, "a line tells it all"
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
