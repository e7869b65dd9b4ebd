"""A run that was killed, interrupted or damaged goes on as if nothing had been."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetrainers.folder import steps_in
from finetrainers.hashing import file_digest
from finetrainers.training.checkpoint import COMPLETE, TENSORS
from tests.end_to_end.runs import exact_rows, run, start, write_config
from tests.end_to_end.saved import saved_tensors

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


def train(settings: dict, tmp_path: Path, output: str, *arguments: str) -> tuple[int, str]:
    config = write_config(tmp_path / "c.yaml", **settings)
    return run(["train", config, f"output={tmp_path / output}", *arguments], tmp_path / "log")


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, weights and the state of the optimizer, to the bit."""
    assert exact_rows(one) == exact_rows(other)
    last = list(steps_in(one / "checkpoints"))[-1]
    checkpoints = [list(steps_in(run / "checkpoints").values())[-1] for run in (one, other)]
    for read in (saved_tensors, lambda checkpoint: load_file(checkpoint / "random.safetensors")):
        ours, theirs = map(read, checkpoints)
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours), last
    left, right = (next((run / "weights" / "latest").rglob("*.safetensors")) for run in (one, other))
    assert file_digest(left) == file_digest(right)


def kill_until_done(settings: dict, tmp_path: Path, *, kills: int, seed: int) -> int:
    """Start the run again and again, killed at random moments, until `kills` have hit; then let it end."""
    draw = random.Random(seed)
    config = write_config(tmp_path / "c.yaml", **settings)
    arguments = ["train", config, f"output={tmp_path / 'killed'}"]
    for output in ("first", "whole"):
        begun = time.monotonic()
        assert run([*arguments[:2], f"output={tmp_path / output}"], tmp_path / "log")[0] == 0
    length = time.monotonic() - begun
    hit = 0
    for _ in range(20 * kills):
        if hit == kills:
            break
        hit += start(arguments, tmp_path / "log").kill_after(draw.uniform(0.1, 1.0) * length)
        if (tmp_path / "killed" / "report.html").exists():
            # It came to its end before all kills had hit: begin anew, so that every kill counts.
            shutil.rmtree(tmp_path / "killed")
    code, said = run(arguments, tmp_path / "log")
    assert code == 0, said
    assert hit == kills
    return hit


def longer(settings: dict, method: dict) -> dict:
    settings["method"] = method
    settings["training"] |= {"steps": 16, "gradient_accumulation_steps": 2}
    settings["checkpoint"] = {"every": 2, "keep": 2}
    settings["validation"] |= {"every": 6, "num_videos": 0}
    return settings


def test_killed_at_twenty_random_moments(settings, tmp_path):
    settings = longer(settings, {"name": "lora", "rank": 4, "dropout": 0.1})
    assert kill_until_done(settings, tmp_path, kills=20, seed=int(time.time())) == 20
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, {"name": "full"}], ids=["lora", "full"])
def test_killed_at_fifty_random_moments(settings, tmp_path, method):
    assert kill_until_done(longer(settings, method), tmp_path, kills=50, seed=7) == 50
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


OTHER_KINDS = {
    "full": ({"name": "full"}, {}),
    "text encoder": ({"name": "lora", "rank": 4, "text_encoder": "lora"}, {}),
    "given frames": ({"name": "lora", "rank": 4}, {"task": "image-to-video"}),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_runs_resume_to_the_bit(settings, tmp_path, kind):
    settings["method"], model = OTHER_KINDS[kind]
    settings["model"] |= model
    settings["optimizer"]["lr_scheduler"] = "constant"
    assert train(settings, tmp_path, "whole")[0] == 0
    assert train(settings, tmp_path, "halves", "training.steps=5")[0] == 0
    code, said = train(settings, tmp_path, "halves")
    assert code == 0 and "resumed from" in said
    assert [row["step"] for row in exact_rows(tmp_path / "halves") if "loss" in row] == list(range(1, 9))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS)
def test_a_signal_saves_and_says_so_by_its_exit_code(settings, tmp_path, number, exit_code):
    settings["training"]["steps"] = 2000
    settings["checkpoint"]["every"] = 0
    settings["optimizer"]["lr_scheduler"] = "constant"
    output = tmp_path / "run"
    settings["validation"]["every"] = 0
    config = write_config(tmp_path / "c.yaml", **settings)
    interrupted = start(["train", config, f"output={output}"], tmp_path / "log")
    interrupted.signal_when(number, output / "metrics.jsonl")
    assert interrupted.end() == exit_code, interrupted.said()
    (step,) = steps_in(output / "checkpoints")
    rows = exact_rows(output)
    assert rows[-1]["step"] == step
    code, said = run(["train", config, f"output={output}", f"training.steps={step + 2}"], tmp_path / "log")
    assert code == 0, said
    assert exact_rows(output)[: len(rows)] == rows
    assert [row["step"] for row in exact_rows(output)] == list(range(1, step + 3))


def damage(checkpoint: Path, how: str) -> None:
    (file,) = (checkpoint / TENSORS).glob("*.safetensors")
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "one bit":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "unmarked":
        (checkpoint / COMPLETE).unlink()
    else:
        (checkpoint / COMPLETE).write_text("{")


@pytest.mark.parametrize("how", ["truncated", "one bit", "missing", "unmarked", "torn mark"])
def test_a_damaged_checkpoint_is_passed_over(settings, tmp_path, how):
    settings["validation"]["every"] = 0
    assert train(settings, tmp_path, "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged", symlinks=True)
    damage(tmp_path / "damaged" / "checkpoints" / "step-00000008", how)
    code, said = train(settings, tmp_path, "damaged")
    assert code == 0, said
    assert "step-00000008 is damaged" in said and "step-00000006" in said
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


OTHERS = [
    ("method.rank=8", "method.rank was 4 and is 8"),
    ("optimizer.lr=1e-2", "optimizer.lr was 0.001 and is 0.01"),
    ("training.seed=1", "training.seed was 42 and is 1"),
    ("data.buckets=[9x32x32]", "data.buckets was ['9x64x96'] and is ['9x32x32']"),
    ("data.trigger=X", "data.trigger was '' and is 'X'"),
]


def test_another_config_is_refused_naming_the_difference(settings, tmp_path):
    settings["validation"]["every"] = 0
    settings["training"]["steps"] = 2
    assert train(settings, tmp_path, "run")[0] == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    for change, difference in OTHERS:
        code, said = train(settings, tmp_path, "run", change)
        assert code == 2 and difference in said, said
        assert "Traceback" not in said
        assert (tmp_path / "run" / "config.yaml").read_text() == config, "a refused resume changes nothing"
    code, said = train(settings, tmp_path, "run", "training.batch_size=1", "--resume", "never")
    assert code == 0, said
    assert (tmp_path / "run" / "previous-001" / "checkpoints" / "step-00000002").is_dir()
    assert [row["step"] for row in exact_rows(tmp_path / "run")] == [1, 2]


def test_resume_from_a_named_checkpoint(settings, tmp_path):
    settings["validation"]["every"] = 0
    assert train(settings, tmp_path, "whole")[0] == 0
    first = tmp_path / "whole" / "checkpoints" / "step-00000003"
    code, said = train(settings, tmp_path, "other", "--resume", str(first))
    assert code == 0, said
    whole, other = exact_rows(tmp_path / "whole"), exact_rows(tmp_path / "other")
    assert other == whole[3:]
    code, said = train(settings, tmp_path, "third", "--resume", str(tmp_path / "nowhere"))
    assert code == 2 and "no complete checkpoint" in said
    state = json.loads((first / "state.json").read_text())
    assert state["train"]["step"] == 3
