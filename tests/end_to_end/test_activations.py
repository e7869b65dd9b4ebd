"""Runs of the command line that keep less for the backward pass, stopped and gone on with otherwise."""

from __future__ import annotations

import pytest

from finetrainers.cli import main
from finetrainers.folder import steps_in
from finetrainers.hashing import file_digest
from finetrainers.memory import offload
from tests.end_to_end.runs import exact_rows, write_config
from tests.end_to_end.saved import saved_tensors


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_may_change_what_it_keeps_when_it_is_resumed(method, settings, tmp_path, monkeypatch):
    """Metrics, the checkpoint and the weights to take away are those of a run that keeps all, to the bit."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    settings["method"] = {"name": "full"} if method == "full" else {"name": "lora", "rank": 4, "dropout": 0.1}
    settings["optimizer"]["lr_scheduler"] = "constant"
    settings["training"] |= {"steps": 4, "precision": "bf16"}
    settings["validation"] |= {"every": 2, "num_videos": 0}
    settings["checkpoint"]["every"] = 2
    config = str(write_config(tmp_path / "c.yaml", **settings))
    other = f"output={tmp_path / 'other'}"
    offloaded = "memory.offload_activations=true"
    assert main(["train", config]) == 0
    assert main(["train", config, other, "training.steps=2", "training.gradient_checkpointing=every-2", offloaded]) == 0
    assert main(["train", config, other, "training.gradient_checkpointing=attention", offloaded]) == 0
    runs = [tmp_path / "run", tmp_path / "other"]
    assert exact_rows(runs[0]) == exact_rows(runs[1])
    plain, kept = (saved_tensors(list(steps_in(run / "checkpoints").values())[-1]) for run in runs)
    assert plain.keys() == kept.keys() and all((plain[key] == kept[key]).all() for key in plain)
    exported = [next((run / "weights" / "latest").rglob("*.safetensors")) for run in runs]
    assert file_digest(exported[0]) == file_digest(exported[1])
