"""Float8 on several processes: the numbers of one, as near as each engine's other numbers are."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.end_to_end.runs import exact_rows, run, write_config
from tests.engines.test_parity import overrides
from tests.engines.tiny_runs import settings
from tests.engines.together import run_together

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
BOUNDS = {"ddp": 0.0, "deepspeed 1": 2e-3, "deepspeed 2": 2e-3, "deepspeed 3": 1e-2, "fsdp": 1e-2}
"""Of the loss of each step. DDP adds gradients in the order in which one process does. ZeRO rounds their sum otherwise,
and fsdp has brought weights to bf16 when they come to float8."""


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in exact_rows(output) if "loss" in row]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("name", ["ltx-0.9.5-i2v", "hunyuan"])
def test_every_engine_is_near_one_process_that_accumulates(folders, clips, tmp_path, name, recipe):
    options = settings(name, folders[name], clips, tmp_path)
    options["training"]["precision"] = "bf16"
    config = write_config(tmp_path / "c.yaml", **options, output="-")
    command = ["train", config, f"method={{name: full, float8_recipe: {recipe}}}"]
    alone = [*command, "training.gradient_accumulation_steps=2", f"output={tmp_path / 'alone'}"]
    code, said = run(alone, tmp_path / "alone.log")
    assert code == 0, said
    commands = [[*command, f"output={tmp_path / engine}", *overrides(engine, tmp_path)] for engine in BOUNDS]
    said = run_together(2, commands, tmp_path / "log")
    assert said.count("compute in float8") == len(BOUNDS)
    expected = losses(tmp_path / "alone")
    weights = load_file(next((tmp_path / "alone" / "weights" / "latest").rglob("*.safetensors")))
    for engine, bound in BOUNDS.items():
        assert losses(tmp_path / engine) == pytest.approx(expected, rel=bound, abs=0), engine
        theirs = load_file(next((tmp_path / engine / "weights" / "latest").rglob("*.safetensors")))
        assert theirs.keys() == weights.keys()
        far = max((theirs[key].float() - each.float()).abs().max() for key, each in weights.items())
        # Two steps of bf16 at 1; a step of the run moves a weight by 0.001.
        assert far <= (0.0 if bound == 0 else 2**-6), engine
