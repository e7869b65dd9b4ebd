"""Compiled blocks on several processes: the numbers of one process whose blocks are not."""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import exact_rows, run, write_config
from tests.engines.tiny_runs import assert_close, settings
from tests.engines.together import run_together

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
ENGINES = {
    "ddp": ["parallel.strategy=ddp"],
    "fsdp": ["parallel.strategy=fsdp"],
    "zero 2": ["parallel.strategy=deepspeed", "parallel.zero_stage=2"],
}
METHODS = {"lora": "method={name: lora, rank: 4, alpha: 8}", "full": "method={name: full}"}
"""Without dropout, which compiled programs draw otherwise."""
CASES = [(name, method) for name in ("ltx-0.9.5-i2v", "cogvideox-5b", "hunyuan", "wan-2.1") for method in METHODS]


@pytest.mark.parametrize("name", ["ltx-0.9.5-i2v", "wan-2.1"])
def test_full_fine_tuning_in_bf16_under_fsdp(folders, clips, tmp_path, name):
    """Weights are collected in fp32 before a block, and rounded within it as one process rounds them."""
    options = settings(name, folders[name], clips, tmp_path)
    options["training"]["precision"] = "bf16"
    config = write_config(tmp_path / "c.yaml", **options, output="-")
    command = ["train", config, METHODS["full"], "training.compile=blocks", "training.steps=20"]
    alone = [*command, "training.gradient_accumulation_steps=2", f"output={tmp_path / 'alone'}"]
    code, said = run(alone, tmp_path / "alone.log")
    assert code == 0, said
    said = run_together(2, [[*command, f"output={tmp_path / 'fsdp'}", *ENGINES["fsdp"]]], tmp_path / "log")
    assert "compiled a block, case 2" in said
    ours, theirs = exact_rows(tmp_path / "alone"), exact_rows(tmp_path / "fsdp")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for left, right in zip(ours, theirs, strict=True):
        assert left == pytest.approx(right, rel=2e-3), left["step"]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_compiled_on_two_processes(folders, clips, tmp_path, name, method):
    """Fifty steps with clipping at work and uneven last batches; saved weights bear the same names."""
    options = settings(name, folders[name], clips, tmp_path)
    config = write_config(tmp_path / "c.yaml", **options, output="-")
    command = ["train", config, METHODS[method], "training.steps=50"]
    alone = [*command, "training.gradient_accumulation_steps=2", f"output={tmp_path / 'alone'}"]
    code, said = run(alone, tmp_path / "alone.log")
    assert code == 0, said
    commands = [
        [*command, "training.compile=blocks", f"output={tmp_path / engine}", *chosen]
        for engine, chosen in ENGINES.items()
    ]
    said = run_together(2, commands, tmp_path / "log")
    assert "compiled a block, case 2" in said
    for engine in ENGINES:
        assert_close(tmp_path / "alone", tmp_path / engine)
