"""Checkpoints: all that is needed to go on exactly, saved whole or not at all, pruned, and resumed from."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetrainers.errors import UserError
from finetrainers.folder import fsync_folder, old_steps, step_name, steps_in
from finetrainers.hashing import file_digest
from finetrainers.training.callback import Callback
from finetrainers.training.random_state import read_random_state, write_random_state
from finetrainers.training.state import StepOutcome, TrainState
from finetrainers.training.trainer import Trainer

logger = logging.getLogger(__name__)

TENSORS = "tensors"
"""Folder of what is trained and of the optimizer's state; each process writes its share."""
COMPLETE = "COMPLETE.json"
"""Written last: size and sha256 of each other file. A checkpoint without it, or that differs from it, is not used."""


class Checkpointer(Callback):
    """Saves every so many steps and at the end, keeps the newest, and loads the newest whole one. It writes while
    training goes on, and waits only for the checkpoint before."""

    def __init__(self, folder: Path, *, every: int, keep: int | None, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self.identity = identity
        """What a resumed run must share with the run that it continues: options, model, clips."""
        self._saved_step = -1
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if self.every and outcome.step % self.every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.state.step != self._saved_step:
            self.save(trainer)
        self._settle(trainer)
        # Also where nothing was saved: a kill may have come between the last save and its pruning.
        if trainer.engine.is_main:
            self._prune(self._saved_step)

    def close(self) -> None:
        self._writer.shutdown()

    def save(self, trainer: Trainer) -> None:
        """Begin to write `step-N`, under another name first, by all processes."""
        self._settle(trainer)
        step, temporary = trainer.state.step, self.folder / f".{step_name(trainer.state.step)}.tmp"
        if trainer.engine.is_main:
            for callback in trainer.callbacks:
                callback.on_checkpoint(trainer)
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / TENSORS).mkdir(parents=True)
            _write(trainer, temporary, self.identity)
        trainer.engine.wait()
        written = trainer.engine.save(trainer.trained, trainer.optimizer, temporary / TENSORS)
        self._writing = self._writer.submit(self._finish, written, temporary, step, is_main=trainer.engine.is_main)
        self._saved_step = step

    def _finish(self, written: Callable[[], None], temporary: Path, step: int, *, is_main: bool) -> None:
        """Once all is written, make it durable and give it its name."""
        written()
        if not is_main:
            return
        _complete(temporary)
        final = self.folder / step_name(step)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(self.folder)
        self._prune(step)
        logger.info("checkpoint %s saved", final.name)

    def _settle(self, trainer: Trainer) -> None:
        """Wait until the checkpoint that is being written is there, on all processes."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            trainer.engine.wait()

    def resume(self, trainer: Trainer, source: str) -> bool:
        """Continue from a checkpoint: `auto` takes the newest whole one, a path that one and no other.

        Returns whether there was one. Raises UserError when the path holds none, or when the checkpoint belongs to
        another config, model or set of clips, naming what differs.
        """
        found = None
        if trainer.engine.is_main:
            found = self.newest_whole() if source == "auto" else _at_path(Path(source))
        checkpoint: Path | None = trainer.engine.gather(found)[0]
        if checkpoint is None:
            return False
        state = json.loads((checkpoint / "state.json").read_text())
        _check_identity(checkpoint, state["identity"], self.identity)
        _check_step(checkpoint, state["batches_per_step"], _batches_per_step(trainer))
        _check_layout(checkpoint, state["layout"], trainer.engine.layout)
        _read(trainer, checkpoint, state)
        trainer.engine.wait()
        if checkpoint.resolve().parent == self.folder.resolve():
            if trainer.engine.is_main:
                self._leave_behind(trainer.state.step)
            self._saved_step = trainer.state.step
        logger.info("resumed from %s", checkpoint)
        return True

    def _leave_behind(self, step: int) -> None:
        """Set later checkpoints aside: damaged ones, or those of a line that a named checkpoint goes back on. Found
        again, they would be taken for this run's own."""
        for later, path in steps_in(self.folder).items():
            if later > step:
                target = self.folder / "left-behind" / path.name
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
                logger.warning("%s was set aside in %s", path.name, target.parent)

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that is complete; damaged ones are named and passed over."""
        for checkpoint in reversed(steps_in(self.folder).values()):
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint
            logger.warning("checkpoint %s is damaged (%s); trying the one before it", checkpoint.name, damage)
        return None

    def _prune(self, step: int) -> None:
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.keep is not None:
            for old in old_steps(self.folder, keep=self.keep, current=step):
                shutil.rmtree(old)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if each of its files is as it was written."""
    try:
        expected = json.loads((checkpoint / COMPLETE).read_text())["files"]
        for name, (size, sha256) in expected.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or file_digest(file) != sha256:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} cannot be read"
    return None


def _at_path(path: Path) -> Path:
    """The checkpoint that a path means: the folder itself, or the newest under a run's or a checkpoints folder."""
    for candidate in (path, *reversed([*steps_in(path / "checkpoints").values(), *steps_in(path).values()])):
        if (candidate / COMPLETE).is_file():
            damage = find_damage(candidate)
            if damage:
                raise UserError(f"--resume {path}: {candidate.name} is damaged ({damage}); name another, or use auto")
            return candidate
    raise UserError(
        f"--resume {path}: there is no complete checkpoint; give a checkpoints/step-N folder, auto or never"
    )


def _check_identity(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    keys = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    if keys:
        changes = "; ".join(_difference(key, saved.get(key), current.get(key)) for key in keys)
        raise UserError(
            f"{checkpoint} belongs to another run: {changes}. Set it back, choose another output, or start anew with "
            "--resume never"
        )


def _batches_per_step(trainer: Trainer) -> dict[str, int]:
    return {"accumulated": trainer.gradient_accumulation_steps, "processes": trainer.engine.data_size}


def _check_step(checkpoint: Path, saved: dict[str, int], current: dict[str, int]) -> None:
    """Steps may be made up otherwise of as many batches, which changes no number; with other processes alone the run
    goes on with smaller or larger steps; nothing else is meant."""
    if math.prod(saved.values()) == math.prod(current.values()):
        return
    said = "; ".join(f"{key} were {saved[key]} and are {current[key]}" for key in saved if saved[key] != current[key])
    if saved["accumulated"] != current["accumulated"]:
        raise UserError(
            f"{checkpoint} belongs to a run of {math.prod(saved.values())} batches a step, and this one has "
            f"{math.prod(current.values())} ({said}); set training.gradient_accumulation_steps so that they agree"
        )
    logger.warning(
        "each step has %d batches now, not %d: %s", math.prod(current.values()), math.prod(saved.values()), said
    )


def _check_layout(checkpoint: Path, saved: str | None, current: str | None) -> None:
    if saved != current:
        anything = "ddp, fsdp or a single process"
        raise UserError(
            f"{checkpoint} was saved by {saved or anything}, and this run is {current or anything}: only the same can "
            "read it. Go on as before, or start anew with --resume never"
        )


def _difference(key: str, was: Any, now: Any) -> str:
    # What is not an option is known by a digest, which tells nobody anything.
    return f"{key} was {was!r} and is {now!r}" if "." in key else f"{key} are not the same"


def _write(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> None:
    """What one process knows of all; the tensors come beside it."""
    save_file(read_random_state(trainer.device), folder / "random.safetensors")
    state = {
        "train": asdict(trainer.state),
        "schedule": trainer.schedule.state_dict(),
        "identity": identity,
        "batches_per_step": _batches_per_step(trainer),
        "layout": trainer.engine.layout,
        "versions": {"torch": torch.__version__},
    }
    (folder / "state.json").write_text(json.dumps(state))


def _complete(folder: Path) -> None:
    """Make each file durable, then write down what is there."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_digest(path)]
    with (folder / COMPLETE).open("w") as file:
        json.dump({"files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder / TENSORS)
    fsync_folder(folder)


def _read(trainer: Trainer, folder: Path, state: dict[str, Any]) -> None:
    trainer.engine.load(trainer.trained, trainer.optimizer, folder / TENSORS)
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.state = TrainState(**state["train"])
    try:
        write_random_state(load_file(folder / "random.safetensors"), trainer.device)
    except SafetensorError as error:
        raise UserError(f"{folder / 'random.safetensors'} is not a safetensors file ({error})") from None
