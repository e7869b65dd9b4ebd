"""Real trackers, offline: what they keep on disk is read back."""

import json
import multiprocessing
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.config.schema import TrackingConfig
from finetrainers.errors import UserError
from finetrainers.folder import RunFolder
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.state import StepOutcome, TrainState
from finetrainers.training.tracking import TRACKERS, Trackers, build_trackers

LOSSES = torch.tensor([0.1, 1 / 3, 2.7182818], dtype=torch.float32)
SETTINGS = {"model": {"path": "tiny"}, "training": {"steps": 3}}


def run(folder: RunFolder, trackers: Trackers, *, first: int = 0, last: int = 3, fails: bool = False) -> None:
    """What a trainer does with its callbacks, with a validation after step 2."""
    trainer: Any = SimpleNamespace(state=TrainState(step=first), device=torch.device("cpu"), callbacks=[])
    metrics = MetricsFile(folder, listeners=[trackers.on_row])
    callbacks = [metrics, trackers]
    for callback in callbacks:
        callback.on_start(trainer)
    for step in range(first + 1, last + 1):
        trainer.state.step = step
        loss = LOSSES[step - 1]
        outcome = StepOutcome(step, 0, loss, 2 * loss, 2e-4, 0.5, 0.1, num_samples=1, num_tokens=8)
        for callback in callbacks:
            callback.on_step_end(trainer, outcome)
        if step == 2:
            for callback in callbacks:
                callback.on_validation(trainer, {"validation_loss": 0.25}, {"a <b>cat</b>": video(folder)})
    for callback in callbacks:
        if not fails:
            callback.on_end(trainer)
        callback.close()


def video(folder: RunFolder) -> Path:
    path = folder.samples / "step-00000002" / "00-a-cat.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked into")
    return path


def test_the_table_is_what_the_config_allows() -> None:
    allowed = TrackingConfig.model_json_schema()["properties"]["trackers"]["items"]["enum"]
    assert sorted(allowed) == sorted(TRACKERS)
    assert build_trackers(TrackingConfig(), RunFolder("nowhere"), settings={}) == []


def test_tensorboard_keeps_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path)
    config = TrackingConfig(trackers="tensorboard")
    run(folder, Trackers(build_trackers(config, folder, settings=SETTINGS)))
    # Killed after step 3, resumed from a checkpoint at step 2: step 3 comes again and must not be there twice.
    run(folder, Trackers(build_trackers(config, folder, settings=SETTINGS)), first=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert torch.equal(torch.tensor([event.value for event in losses]), LOSSES)
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(2, 0.25)]
    assert "step" not in events.Tags()["scalars"]
    (text,) = events.Tensors("samples/00-a-cat/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (
        2,
        "a <b>cat</b>\n\nsamples/step-00000002/00-a-cat.mp4",
    )


def test_wandb_keeps_the_numbers_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_SILENT": "true", "WANDB_API_KEY": "k" * 40, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path / "crush")
    config = TrackingConfig(trackers="wandb", wandb_mode="offline", project="films")
    run(folder, Trackers(build_trackers(config, folder, settings=SETTINGS)))
    # wandb names its folders by the second.
    (folder.root / "wandb").rename(folder.root / "first")
    # A resumed run is another process; within one, wandb's service now and then drops a row of an id that it knows.
    resumed_process = multiprocessing.get_context("spawn").Process(target=run_resumed, args=(folder, config))
    resumed_process.start()
    resumed_process.join(120)
    assert resumed_process.exitcode == 0
    run_id = (folder.root / "wandb_run_id.txt").read_text().strip()
    paths = [next((folder.root / name).glob("offline-run-*/*.wandb")) for name in ("first", "wandb")]
    assert [path.name for path in paths] == [f"run-{run_id}.wandb"] * 2, "a resumed run keeps its id"

    whole, resumed = [read_wandb(path) for path in paths]
    history = [row for row in whole["history"] if "loss" in row]
    assert [row["step"] for row in history] == [1, 2, 3]
    assert [row["loss"] for row in history] == LOSSES.tolist()
    validations = [row for row in whole["history"] if "validation_loss" in row]
    assert [(row["step"], row["validation_loss"]) for row in validations] == [(2, 0.25)]
    captions = [row["samples/00-a-cat.caption"] for row in whole["history"] if "samples/00-a-cat.path" in row]
    assert captions == ["a <b>cat</b>"]
    assert {key: whole["config"][key] for key in SETTINGS} == SETTINGS
    assert whole["run"].project == "films" and whole["run"].display_name == "crush"
    assert [row["step"] for row in resumed["history"] if "loss" in row] == [3]
    assert (whole["exit_code"], resumed["exit_code"]) == (0, 1)
    for path in folder.root.rglob("*"):
        assert not path.is_file() or b"k" * 40 not in path.read_bytes(), f"an API key in {path.name}"


def run_resumed(folder: RunFolder, config: TrackingConfig) -> None:
    """The run goes on from step 2, and fails."""
    run(folder, Trackers(build_trackers(config, folder, settings=SETTINGS)), first=2, fails=True)


def read_wandb(path: Path) -> dict[str, Any]:
    """Records of an offline run: a leveldb log (blocks of 32 KiB, each record with its crc, length and kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, pending = path.read_bytes(), 7, b""
    found: dict[str, Any] = {"history": [], "config": {}}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        # 1 is whole; 2, 3 and 4 are first, middle and last part.
        if kind not in (1, 4):
            continue
        record, pending = Record.FromString(pending), b""
        if record.HasField("history"):
            items = record.history.item
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            found["history"].append(values)
        elif record.HasField("run"):
            found["run"] = record.run
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("exit"):
            found["exit_code"] = record.exit.exit_code
    return found


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install finetrainers\[{name}\]"):
        build_trackers(TrackingConfig(trackers=name), RunFolder(tmp_path), settings={})


def test_without_a_login_wandb_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"No API key configured.*wandb login.*wandb_mode=offline"):
        build_trackers(TrackingConfig(trackers="wandb"), RunFolder(tmp_path), settings={})


def test_optional_packages_are_imported_where_they_are_used() -> None:
    code = (
        "import sys, finetrainers.training.tracking; print([m for m in ('wandb', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
