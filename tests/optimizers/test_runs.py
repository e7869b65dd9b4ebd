"""Whole runs through the command line: several processes, resumption in another way, and what is refused there."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetrainers.demo.clips import render_clips
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.engines.tiny_runs import METHODS, settings
from tests.engines.together import run_together

pytestmark = pytest.mark.timeout(600)
FULL = "method={name: full, weights_dtype: bf16}"


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return render_clips(tmp_path_factory.mktemp("clips"), 4, num_frames=22, height=64, width=96, fps=16.0).parent


def config_of(folders, clips, tmp_path):
    options = settings("ltx-0.9.0", folders["ltx-0.9.0"], clips, tmp_path)
    options["training"] |= {"steps": 5, "precision": "bf16"}
    options["checkpoint"] = {"every": 3}
    return write_config(tmp_path / "c.yaml", **options, output="-")


def test_ddp_with_the_state_on_the_host_and_weights_in_bf16(folders, clips, tmp_path):
    """Where the state lies changes nothing; both processes round alike, or weights would drift apart and the second leg
    differ; one process that accumulates gives nearly the same."""
    config = config_of(folders, clips, tmp_path)

    def command(output, *overrides, strategy="ddp"):
        return ["train", config, f"output={tmp_path / output}", f"parallel.strategy={strategy}", *overrides]

    offload = "optimizer.offload=true"
    commands = [
        command("bf16", FULL),
        command("bf16-offload", FULL, offload, "training.steps=3"),
        command("bf16-offload", FULL),
        command("lora", METHODS["lora"]),
        command("lora-offload", METHODS["lora"], offload),
    ]
    run_together(2, commands, tmp_path / "log")
    for name in ("bf16", "lora"):
        assert exact_rows(tmp_path / name) == exact_rows(tmp_path / f"{name}-offload") != []
    one = command("one", FULL, "training.gradient_accumulation_steps=2", strategy="auto")
    code, said = run(one, tmp_path / "log")
    assert code == 0, said
    for ours, theirs in zip(exact_rows(tmp_path / "one"), exact_rows(tmp_path / "bf16"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
    (file,) = (tmp_path / "bf16" / "weights" / "latest").rglob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_updates_in_the_backward_pass_and_what_is_refused(folders, clips, tmp_path):
    config = config_of(folders, clips, tmp_path)

    def train(output, *overrides):
        return run(["train", config, METHODS["full"], f"output={tmp_path / output}", *overrides], tmp_path / "log")

    unclipped = "training.max_grad_norm=0"
    assert train("plain", unclipped)[0] == 0
    assert train("early", unclipped, "optimizer.in_backward=true", "training.steps=3")[0] == 0
    assert train("early", unclipped, "optimizer.offload=true", "training.gradient_checkpointing=false")[0] == 0
    assert exact_rows(tmp_path / "plain") == exact_rows(tmp_path / "early") != []
    for overrides, said in (
        (["optimizer.in_backward=true"], "set training.max_grad_norm to 0"),
        (["optimizer={name: prodigy, offload: true}"], "prodigy sets its step size by all of them"),
        (["optimizer={name: adafactor, eps: 1e-6}"], "optimizer.eps is not used by adafactor"),
        ([FULL, "training.precision=fp32"], "set training.precision to bf16"),
    ):
        code, answer = train("refused", *overrides)
        assert code == 2 and said in answer and len(answer.strip().splitlines()) == 1, answer
    assert not (tmp_path / "refused").exists()


def test_prodigy_begins_at_one(folders, clips, tmp_path):
    config = config_of(folders, clips, tmp_path)
    command = ["train", config, METHODS["lora"], f"output={tmp_path / 'run'}", "optimizer={name: prodigy}"]
    code, said = run(command, tmp_path / "log")
    assert code == 0 and "decoupled" not in said, said
    assert {row["lr"] for row in exact_rows(tmp_path / "run")} == {1.0}
    state = json.loads((tmp_path / "run/checkpoints/step-00000005/tensors/optimizer.json").read_text())
    assert "d_max" in json.dumps(state["param_groups"])
