"""Every engine gives the numbers of one process: real runs over gloo, through the command line."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import exact_rows, run, write_config
from tests.engines.tiny_runs import METHODS, assert_close, settings
from tests.engines.together import run_together

pytestmark = pytest.mark.timeout(600)
ROWS = ["ltx-0.9.5-i2v", "cogvideox-5b", "hunyuan"]
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "fsdp offload": {"offload": "parameters"},
    "deepspeed 1": {"zero_stage": 1},
    "deepspeed 2": {"zero_stage": 2},
    "deepspeed 2 offload": {"zero_stage": 2, "offload": "optimizer"},
    "deepspeed 3": {"zero_stage": 3},
    "deepspeed 3 offload": {"zero_stage": 3, "offload": "parameters"},
}
EVERYTHING_SHARED = {"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 0}}
"""DeepSpeed would leave the small tensors of tiny models whole."""


def overrides(engine: str, folder: Path) -> list[str]:
    """The options that choose an engine."""
    strategy = engine.split()[0]
    chosen = [f"parallel.strategy={strategy}", *(f"parallel.{key}={value}" for key, value in ENGINES[engine].items())]
    if strategy == "deepspeed":
        (folder / "ds.json").write_text(json.dumps(EVERYTHING_SHARED))
        chosen.append(f"parallel.deepspeed_config={folder / 'ds.json'}")
    return chosen


def assert_ran(engine: str, said: str, count: int) -> None:
    """The engine that was asked for ran: read back from what it holds."""
    strategy, *_ = engine.split()
    assert f"{strategy} on {count} processes" in said
    trained, every = (int(n.replace(",", "")) for n in re.search(r"trains ([\d,]+) of ([\d,]+) par", said).groups())
    held = int(re.search(rf"each of {count} processes holds about ([\d,]+) of them", said)[1].replace(",", ""))
    shared = strategy == "fsdp" or ENGINES[engine].get("zero_stage") == 3
    # Tensors that do not divide evenly leave the first process a little more.
    assert held == every if not shared else every / count <= held < 1.25 * every / count, engine
    if strategy == "deepspeed":
        stage, values = re.search(r"ZeRO stage (\d): this process's optimizer has ([\d,]+) numbers", said).groups()
        assert int(stage) == ENGINES[engine]["zero_stage"]
        assert trained / count <= int(values.replace(",", "")) < 1.25 * trained / count


SLOW = {
    ("ltx-0.9.5-i2v", "full", 4), ("cogvideox-5b", "lora", 4), ("hunyuan", "full", 2),
    ("hunyuan", "full", 4), ("hunyuan", "lora", 4), ("cogvideox-5b", "full", 4),
}  # fmt: skip
"""Up to a minute each. Each family and each method is tested without them, on four processes LTX-Video's LoRA."""


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case in SLOW else [])
        for case in itertools.product(ROWS, METHODS, (2, 4))
    ],
)
def test_every_engine_is_one_process_that_accumulates(folders, clips, tmp_path, name, method, count):
    """Twenty steps with clipping at work, uneven last batches and epochs that end within a step."""
    config = write_config(tmp_path / "c.yaml", **settings(name, folders[name], clips, tmp_path), output="-")
    accumulated = "training.gradient_accumulation_steps=%d"
    command = ["train", config, METHODS[method]]
    code, said = run([*command, accumulated % 4, f"output={tmp_path / 'alone'}"], tmp_path / "alone.log")
    assert code == 0, said
    rows = [row for row in exact_rows(tmp_path / "alone") if "loss" in row]
    assert len(rows) == 20 and min(row["grad_norm"] for row in rows) > 0.01, "clipping must be at work"
    # On four processes without the two whose offload is that of two processes.
    engines = [engine for engine in ENGINES if count == 2 or ENGINES[engine].get("offload") != "parameters"]
    commands = [
        [*command, accumulated % (4 // count), f"output={tmp_path / engine}", *overrides(engine, tmp_path)]
        for engine in engines
    ]
    said = run_together(count, commands, tmp_path / "log")
    parts = re.split(r"(?=^\w+ on \d processes$)", said, flags=re.M)[1:]
    for engine, part in zip(engines, parts, strict=True):
        assert_ran(engine, part, count)
        assert_close(tmp_path / "alone", tmp_path / engine)


@pytest.mark.parametrize("name", [pytest.param("ltx-0.9.0", marks=pytest.mark.slow), "hunyuan"])
def test_a_trained_text_encoder_is_spread_too(folders, clips, tmp_path, name):
    config = write_config(tmp_path / "c.yaml", **settings(name, folders[name], clips, tmp_path), output="-")
    command = ["train", config, "method={name: lora, rank: 4, text_encoder: lora}"]
    alone = [*command, "training.gradient_accumulation_steps=2", f"output={tmp_path / 'alone'}"]
    assert run(alone, tmp_path / "alone.log")[0] == 0
    engines = ("ddp", "fsdp", "deepspeed 3")
    commands = [[*command, f"output={tmp_path / engine}", *overrides(engine, tmp_path)] for engine in engines]
    run_together(2, commands, tmp_path / "log")
    for engine in engines:
        assert_close(tmp_path / "alone", tmp_path / engine)
