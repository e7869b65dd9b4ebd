"""Checkpoints are whole or absent at every moment of their writing, pruned, and complete in what they hold."""

import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetrainers.errors import UserError
from finetrainers.folder import steps_in
from finetrainers.hashing import file_digest
from finetrainers.training.checkpoint import COMPLETE, TENSORS, Checkpointer, _check_step, find_damage
from finetrainers.training.random_state import read_random_state, seed_random_state, write_random_state
from tests.families.tiny import TINY
from tests.training.tiny_run import full, lora, make_batch, make_trainer

SHARD = f"{TENSORS}/shard-00001-model-00001-of-00001.safetensors"
FILES = {SHARD, f"{TENSORS}/optimizer.json", "random.safetensors", "state.json", COMPLETE}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))


def checkpointer(folder, **options):
    return Checkpointer(
        folder, **({"every": 2, "keep": None, "identity": {"training.seed": 1, "the clips": "a1"}} | options)
    )


def trainer_with(model, saver, *, steps=6, options=None, optimizer="adamw"):
    batches = [make_batch([0, 1]), make_batch([2, 3]), make_batch([4])]
    return make_trainer(
        model, batches, callbacks=[saver], steps=steps, options=options or lora(dropout=0.1), optimizer=optimizer
    )


@pytest.mark.parametrize(("every", "keep", "left"), [(2, None, [2, 4, 6]), (2, 1, [6]), (4, 2, [4, 6]), (0, 3, [6])])
def test_which_are_saved_and_kept(model, tmp_path, every, keep, left):
    trainer_with(model, checkpointer(tmp_path, every=every, keep=keep)).fit()
    assert list(steps_in(tmp_path)) == left
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:08d}" for step in left}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("options", [lora(dropout=0.1), full()], ids=["lora", "full"])
def test_a_resumed_trainer_equals_the_one_that_went_on(model, tmp_path, options, optimizer):
    saver = checkpointer(tmp_path)
    whole = trainer_with(model, saver, options=options, optimizer=optimizer)
    whole.fit()
    shutil.rmtree(tmp_path / "step-00000006")
    resumed = trainer_with(model, other := checkpointer(tmp_path), options=options, optimizer=optimizer)
    assert other.resume(resumed, "auto")
    assert (resumed.state.step, resumed.state.batches, resumed.state.samples) == (4, 4, 7)
    resumed.fit()
    for name, parameter in whole.trained.items():
        assert torch.equal(parameter, resumed.trained[name]), name


def test_what_a_checkpoint_holds(model, tmp_path):
    """Only what moves, never the base; about three times the LoRA: weights and two running means."""
    trainer = trainer_with(model, checkpointer(tmp_path))
    trainer.fit()
    folder = tmp_path / "step-00000006"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == FILES
    expected = {f"trained/{name}" for name in trainer.trained}
    expected |= {f"state/{n}/{kind}" for n in range(len(trainer.trained)) for kind in ("exp_avg", "exp_avg_sq", "step")}
    assert load_file(folder / SHARD).keys() == expected
    state = json.loads((folder / "state.json").read_text())
    assert state["train"] == {"step": 6, "batches": 6, "samples": 10}
    assert state.keys() == {"train", "schedule", "identity", "batches_per_step", "layout", "versions"}
    assert load_file(folder / "random.safetensors").keys() == {
        "python",
        "python_gauss",
        "numpy",
        "numpy_gauss",
        "torch",
    }


def test_random_state_covers_every_generator():
    seed_random_state(5)
    random.gauss(0, 1), np.random.randn(3), torch.randn(3)
    state = read_random_state(torch.device("cpu"))

    def draws():
        return random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.randn(2).tolist()

    expected = draws()
    seed_random_state(6)
    assert draws() != expected
    write_random_state(state, torch.device("cpu"))
    assert draws() == expected


def test_another_identity_is_refused(model, tmp_path):
    trainer_with(model, checkpointer(tmp_path), steps=2).fit()
    other = checkpointer(tmp_path, identity={"training.seed": 2, "method.rank": 4, "the clips": "b2"})
    with pytest.raises(
        UserError, match=r"method\.rank was None and is 4; the clips are not the same; training\.seed was 1 and is 2"
    ):
        other.resume(trainer_with(model, other), "auto")


def test_going_back_to_a_named_checkpoint_leaves_later_ones_behind(model, tmp_path):
    trainer_with(model, checkpointer(tmp_path)).fit()
    saver = checkpointer(tmp_path, every=0)
    trainer = trainer_with(model, saver, steps=3)
    assert saver.resume(trainer, str(tmp_path / "step-00000002"))
    trainer.fit()
    assert list(steps_in(tmp_path)) == [2, 3]
    assert list(steps_in(tmp_path / "left-behind")) == [4, 6]
    again = checkpointer(tmp_path)
    assert again.newest_whole().name == "step-00000003"


def test_no_checkpoint_is_no_resume(model, tmp_path):
    saver = checkpointer(tmp_path / "none")
    assert not saver.resume(trainer_with(model, saver), "auto")


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "extend"])
def test_any_damage_to_any_file_is_found(model, tmp_path, damage):
    trainer_with(model, checkpointer(tmp_path), steps=2).fit()
    good = tmp_path / "step-00000002"
    assert find_damage(good) is None
    for name in sorted(FILES):
        bad = shutil.copytree(good, tmp_path / "bad")
        content = bytearray((bad / name).read_bytes())
        if damage == "delete":
            (bad / name).unlink()
        elif damage == "truncate":
            (bad / name).write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            content[len(content) // 2] ^= 2
            (bad / name).write_bytes(content)
        else:
            (bad / name).write_bytes(content + b"x")
        assert find_damage(bad) is not None, name
        shutil.rmtree(bad)


def test_a_pickle_is_never_opened(model, tmp_path):
    """A checkpoint is safetensors and JSON; a pickle under one of its names is refused, not run."""
    trainer_with(model, checkpointer(tmp_path), steps=2).fit()
    folder = tmp_path / "step-00000002"
    trap = tmp_path / "trap"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    torch.save(Bomb(), folder / SHARD)
    marked = json.loads((folder / COMPLETE).read_text())
    bomb = folder / SHARD
    marked["files"][SHARD] = [bomb.stat().st_size, file_digest(bomb)]
    (folder / COMPLETE).write_text(json.dumps(marked))
    saver = checkpointer(tmp_path)
    with pytest.raises(UserError, match="holds a file that is not safetensors"):
        saver.resume(trainer_with(model, saver), "auto")
    assert not trap.exists()


CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def killed_at(model, folder, call, number):
    """Train in a child that kills itself at the n-th call of one kind; returns whether it came to that."""
    child = os.fork()
    if child == 0:
        count = 0
        original = getattr(os, call)

        def deadly(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, call, deadly)
        code = 1
        try:
            saver = checkpointer(folder, every=1, keep=1)
            trainer = trainer_with(model, saver, steps=2)
            saver.resume(trainer, "auto")
            trainer.fit()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("call", CALLS)
def test_killed_at_every_call_that_writes(model, tmp_path, call):
    """At any of them the newest checkpoint that is found is whole, and after the first there always is one."""
    number, found = 0, 0
    while True:
        number += 1
        folder = tmp_path / f"{call}-{number}"
        folder.mkdir()
        died = killed_at(model, folder, call, number)
        newest = checkpointer(folder).newest_whole()
        named = list(steps_in(folder))
        assert newest is not None or not named, "a checkpoint under its name is whole"
        if newest is not None:
            found += 1
            assert newest.name == f"step-{named[-1]:08d}"
        if not died:
            assert named == [2]
            break
        # Whatever was left behind, the next start ends with the last checkpoint alone.
        assert not killed_at(model, folder, call, 10**9)
        assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert found > 1 or call in ("unlink", "rmdir")


STEPS = [
    # Accumulated batches and processes of the run that is gone on from, and of this one; None goes on without a word.
    ((4, 1), (2, 2), None),
    ((1, 4), (4, 1), None),
    ((2, 4), (2, 2), "each step has 4 batches now, not 8: processes were 4 and are 2"),
]


@pytest.mark.parametrize(("saved", "current", "said"), STEPS)
def test_processes_may_change(caplog, saved, current, said):
    with caplog.at_level(logging.WARNING, "finetrainers"):
        made = (dict(zip(("accumulated", "processes"), counts, strict=True)) for counts in (saved, current))
        _check_step(Path("step-1"), *made)
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])


def test_another_accumulation_is_refused_where_processes_do_not_make_up_for_it():
    with pytest.raises(UserError, match=r"8 batches a step, and this one has 6 \(accumulated were 2 and are 3"):
        _check_step(Path("step-1"), {"accumulated": 2, "processes": 4}, {"accumulated": 3, "processes": 2})
