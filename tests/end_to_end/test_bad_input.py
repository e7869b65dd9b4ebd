"""Wrong input gets exit code 2 and one line that names what is wrong; damage among good clips stops nothing."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetrainers.cli import main
from finetrainers.folder import read_rows
from tests.end_to_end.runs import run, write_config


def answer(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    """The one line that `train` prints for a wrong input."""
    code = main(["train", str(config), "--quiet", *overrides])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetrainers: ")]
    assert code == 2
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


WRONG = {
    "an unknown key": (["training.stepz=3"], ["training.stepz", "did you mean `training.steps`?"]),
    "a wrong type": (["training.steps=many"], ["training.steps", "many"]),
    "a missing source": (["data.train=nowhere"], ["nowhere"]),
    "a model that is nowhere": (["model.path=no/such/model"], ["model.path", "no/such/model"]),
    "a size that the model cannot take": (["data.buckets=[10x64x96]"], ["10x64x96", "8k+1", "9x64x96"]),
    "a height that the model cannot take": (["data.buckets=[9x65x96]"], ["9x65x96", "multiples of 32", "9x64x96"]),
    "a size that is none": (["data.buckets=[9x64]"], ["9x64", "FRAMESxHEIGHTxWIDTH"]),
    "a task that there is not": (["model.task=dance"], ["dance", "text-to-video"]),
    "an option of another family": (["model.experts=both"], ["model.experts", "ltx", "wan"]),
    "a family that is nowhere": (["model.family=no.such.Family"], ["model.family no.such.Family", "package.module"]),
    "a family that is none": (["model.family=pathlib.Path"], ["pathlib.Path is no subclass of"]),
    "frames given to a model of text": (["data.conditions=first"], ["data.conditions first", "set model.task"]),
    "frames that this model is not given": (
        ["model.task=image-to-video", "data.conditions=first_last"],
        ["data.conditions first_last with data.buckets 9x64x96", "first frame or none"],
    ),
    "weights for a flow": (["objective.loss_weighting=min_snr"], ["min_snr is for models that predict v"]),
    "prompts without images": (
        ["model.task=image-to-video", "validation.prompts=[one]"],
        ["validation.images", "each of the 1 validation.prompts"],
    ),
    "an image that is none": (
        ["model.task=image-to-video", "validation.prompts=[one]", "validation.images=[nowhere.png]"],
        ["validation.images nowhere.png"],
    ),
    "targets that match nothing": (["method.target_modules=[nothing]"], ["nothing", "transformer_blocks"]),
    "too long a bucket": (["data.buckets=[97x64x96]"], ["needs 97", "18 frames"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option(settings, tmp_path, capsys, case):
    overrides, expected = WRONG[case]
    line = answer(capsys, write_config(tmp_path / "c.yaml", **settings), *overrides)
    assert all(part in line for part in expected), line


def only(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir()
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_text("a caption")


def empty_folder(folder: Path, clip: bytes) -> None:
    folder.mkdir()


def zero_bytes(folder: Path, clip: bytes) -> None:
    only(folder, "zero.mp4", b"")


def not_a_video(folder: Path, clip: bytes) -> None:
    only(folder, "page.mp4", b"<html>not found</html>" * 50)


def truncated(folder: Path, clip: bytes) -> None:
    only(folder, "cut.mp4", clip[: len(clip) // 2])


def table_of_missing_file(folder: Path, clip: bytes) -> None:
    only(folder, "here.mp4", clip)
    (folder / "metadata.csv").write_text("file_name,caption\nhere.mp4,a\nabsent.mp4,b\n")


def no_captions(folder: Path, clip: bytes) -> None:
    only(folder, "here.mp4", clip)
    (folder / "here.txt").unlink()


BAD_FOLDERS: list[tuple[Callable[[Path, bytes], None], list[str]]] = [
    (empty_folder, ["bad"]),
    (zero_bytes, ["zero.mp4"]),
    (not_a_video, ["page.mp4"]),
    (truncated, ["cut.mp4"]),
    (table_of_missing_file, ["metadata.csv", "absent.mp4"]),
    (no_captions, ["here.mp4", "caption"]),
]


@pytest.mark.parametrize(("make", "named"), BAD_FOLDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_without_a_usable_clip(settings, clips, tmp_path, capsys, make, named):
    make(tmp_path / "bad", next(clips.glob("*.mp4")).read_bytes())
    settings["data"]["validation"] = None
    line = answer(capsys, write_config(tmp_path / "c.yaml", **settings), f"data.train={tmp_path / 'bad'}")
    assert all(part in line for part in named), line


def test_a_model_of_an_unknown_family(settings, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SomeImagePipeline"}))
    line = answer(capsys, write_config(tmp_path / "c.yaml", **settings), f"model.path={tmp_path}")
    assert "SomeImagePipeline" in line and "LTXPipeline" in line


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["tran"], 2), (["train"], 2), (["train", "absent.yaml"], 2), (["--version"], 0), (["train", "-h"], 0)],
)
def test_exit_codes_of_the_command_line(capsys, arguments, code):
    assert main(arguments) == code
    assert "Traceback" not in capsys.readouterr().err


def test_an_engine_for_many_processes_is_refused_in_one(settings, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", **settings)
    assert "start them with --nproc N or torchrun" in answer(capsys, config, "parallel.strategy=ddp")


@pytest.fixture
def mixed(clips, tmp_path) -> Path:
    """Five good clips and three that are not."""
    folder = shutil.copytree(clips, tmp_path / "mixed")
    good = next(clips.glob("*.mp4")).read_bytes()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "page.mp4").write_bytes(b"<html></html>")
    (folder / "cut.mp4").write_bytes(good[: len(good) * 2 // 3])
    with (folder / "metadata.csv").open("a", newline="") as file:
        csv.writer(file).writerows([[name, "broken"] for name in ("zero.mp4", "page.mp4", "cut.mp4")])
    return folder


def test_broken_clips_among_good_ones_are_named_and_counted(settings, mixed, tmp_path):
    config = write_config(tmp_path / "c.yaml", **settings)
    code, said = run(["train", config, f"data.train={mixed}"], tmp_path / "log")
    assert code == 0, said
    assert "3 of 8 clips" in said
    problems = {row["name"]: row["reason"] for row in read_rows(Path(settings["output"]) / "problems.jsonl")}
    assert problems.keys() == {"zero.mp4", "page.mp4", "cut.mp4"} and all(problems.values())
    assert all(name in said for name in problems)
    assert [row["step"] for row in read_rows(Path(settings["output"]) / "metrics.jsonl") if "loss" in row][-1] == 8
    strict = ["precompute", config, f"data.train={mixed}", "data.strict=true"]
    code, said = run(strict, tmp_path / "log")
    assert code == 2 and "2 of 8 clips" in said and "zero.mp4" in said and "page.mp4" in said, said
    for name in ("zero.mp4", "page.mp4"):
        shutil.copy(mixed / "cut.mp4", mixed / name)
    code, said = run(strict, tmp_path / "log")
    assert code == 2 and "3 of 8 clips" in said and all(name in said for name in problems), said


def test_a_corrupt_cache_file_is_encoded_again(settings, tmp_path):
    config = write_config(tmp_path / "c.yaml", **settings)
    assert run(["precompute", config], tmp_path / "log")[0] == 0
    videos = sorted((Path(settings["output"]) / "cache" / "videos").rglob("*.safetensors"))
    good = [path.read_bytes() for path in videos]
    videos[0].write_bytes(good[0][:-9])
    videos[1].write_bytes(b"garbage")
    flipped = bytearray(good[2])
    flipped[-1] ^= 4
    videos[2].write_bytes(flipped)
    code, said = run(["train", config], tmp_path / "log")
    assert code == 0, said
    assert said.count("is damaged and will be encoded again") == 3
    assert [path.read_bytes() for path in videos] == good


def test_a_mistake_is_answered_before_processes_are_started(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "finetrainers.launching", None)
    settings["training"]["stepz"] = 3
    said = answer(capsys, write_config(tmp_path / "c.yaml", **settings), "--nproc", "2")
    assert "training.stepz" in said and "steps" in said
