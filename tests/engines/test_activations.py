"""Activations that are computed again or lie on the host, on several processes: each engine gives the numbers that it
gives without, to the bit; but for DeepSpeed, which sums in another order as soon as blocks are computed again."""

from __future__ import annotations

import pytest

from finetrainers.memory import offload
from tests.end_to_end.runs import exact_rows, write_config
from tests.engines.test_parity import overrides
from tests.engines.tiny_runs import METHODS, settings
from tests.engines.together import run_together

OFFLOAD = "memory.offload_activations=true"
WAYS = {
    "none": [],
    "none offloaded": [OFFLOAD],
    "attention": ["training.gradient_checkpointing=attention"],
    "feed_forward offloaded": ["training.gradient_checkpointing=feed_forward", OFFLOAD],
    "every-2 offloaded": ["training.gradient_checkpointing=every-2", OFFLOAD],
    "full offloaded": ["training.gradient_checkpointing=full", OFFLOAD],
}


def send_all() -> None:
    """Tensors of tiny models are sent too."""
    offload.SMALLEST = 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("engine", "name", "method"),
    [
        ("fsdp", "hunyuan", "full"),
        pytest.param("fsdp", "ltx-0.9.0", "lora", marks=pytest.mark.slow),
        pytest.param("ddp", "cogvideox-5b", "lora", marks=pytest.mark.slow),
        pytest.param("deepspeed 3", "ltx-0.9.0", "full", marks=pytest.mark.slow),
    ],
)
def test_no_number_changes(folders, clips, tmp_path, engine, name, method):
    given = settings(name, folders[name], clips, tmp_path)
    # Under fsdp, linear layers are a group of their own in bf16.
    given["training"] |= {"steps": 3, "precision": "bf16", "gradient_checkpointing": False}
    config = write_config(tmp_path / "c.yaml", **given, output="-")
    command = ["train", config, METHODS[method], *overrides(engine, tmp_path)]
    commands = [[*command, f"output={tmp_path / way}", *options] for way, options in WAYS.items()]
    run_together(2, commands, tmp_path / "log", before=send_all)
    for way in WAYS:
        ours, theirs = exact_rows(tmp_path / way), exact_rows(tmp_path / "none")
        if engine.startswith("deepspeed"):
            theirs = [pytest.approx(row, rel=1e-4) for row in theirs]
        assert ours == theirs, way
