"""The plan's numbers, worked out here from the model's config and the clips; and that it reads no weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.end_to_end.runs import write_config


@pytest.fixture
def config(model: Path, clips: Path, tmp_path: Path) -> Path:
    content: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(clips), "buckets": ["9x64x96"]},
        "method": {"name": "lora", "rank": 4},
        "training": {"steps": 30, "batch_size": 2},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def linear_sizes(model: Path) -> dict[str, tuple[int, int]]:
    """Rows and columns of each weight matrix of the transformer, by the layer's name."""
    tensors = load_file(next((model / "transformer").glob("*.safetensors")))
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in tensors.items()}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}


def num_all(model: Path) -> int:
    tensors = load_file(next((model / "transformer").glob("*.safetensors")))
    return sum(tensor.numel() for tensor in tensors.values())


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = [
    ([], ATTENTION, 4),
    (["method.rank=16", "method.alpha=3"], ATTENTION, 16),
    (["method.target_modules=[to_q, to_out.0]"], ("to_q", "to_out.0"), 4),
    (["method.target_modules=.*\\.ff\\.net\\.0\\.proj"], ("ff.net.0.proj",), 4),
]


@pytest.mark.parametrize(("overrides", "ends", "rank"), TARGETS)
def test_trained_parameters_of_a_lora(call, config, model, overrides, ends, rank):
    """Each adapter is rank x columns and rows x rank."""
    answer = call("plan", config, "--json", *overrides)
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    expected = sum(
        rank * (rows + columns)
        for name, (rows, columns) in linear_sizes(model).items()
        if name.startswith("transformer_blocks.") and name.endswith(tuple(f".{end}" for end in ends))
    )
    assert expected > 0
    assert plan["trained_parameters"] == expected
    assert plan["parameters"] == num_all(model) + expected
    assert (plan["family"], plan["method"]) == ("ltx", "lora")


def test_full_fine_tuning_trains_all(call, config, model, tmp_path):
    config.write_text(config.read_text().replace("name: lora\n  rank: 4", "name: full"))
    plan = json.loads(call("plan", config, "--json").out)
    assert plan["method"] == "full"
    assert plan["trained_parameters"] == plan["parameters"] == num_all(model)


EPOCHS = [
    ([], 4, 30 / 4),
    (["training.batch_size=1"], 7, 30 / 7),
    (["training.batch_size=3"], 3, 30 / 3),
    (["training.batch_size=100"], 1, 30),
    (["training.gradient_accumulation_steps=3", "training.steps=10"], 4, 10 * 3 / 4),
    (["training.steps=0"], 4, 0),
]


@pytest.mark.parametrize(("overrides", "batches", "epochs"), EPOCHS)
def test_batches_and_epochs(call, config, overrides, batches, epochs):
    plan = json.loads(call("plan", config, "--json", *overrides).out)
    assert (plan["train_samples"], plan["held_out_samples"], plan["left_out"]) == (7, 0, [])
    assert plan["batches_per_epoch"] == batches
    assert plan["epochs"] == pytest.approx(epochs)


BUCKETS = [
    (["data.buckets=[9x64x96]"], [("9x64x96", 7, 2 * 2 * 3)]),
    (["data.buckets=[17x64x96, 9x64x96]"], [("17x64x96", 7, 3 * 2 * 3)]),
    (["data.buckets=[9x64x96]", "data.window=all"], [("9x64x96", 14, 2 * 2 * 3)]),
    (["data.buckets=[9x32x64]"], [("9x32x64", 7, 2 * 1 * 2)]),
]


@pytest.mark.parametrize(("overrides", "expected"), BUCKETS)
def test_buckets_and_tokens(call, config, overrides, expected):
    """A token is 8 frames of 32x32 pixels, and the first frame makes one of its own."""
    plan = json.loads(call("plan", config, "--json", *overrides).out)
    assert [(bucket["bucket"], bucket["clips"], bucket["tokens"]) for bucket in plan["buckets"]] == expected
    assert plan["train_samples"] == sum(clips for _, clips, _ in expected)


def test_several_buckets_and_clips_that_are_left_out(call, config, clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    (folder / "metadata.csv").unlink()
    Image.new("RGB", (96, 64)).save(folder / "still.png")
    (folder / "zero.mp4").touch()
    for clip in [*folder.glob("*.mp4"), folder / "still.png"]:
        clip.with_suffix(".txt").write_text("a caption")
    given = [f"data.train={folder}", "data.buckets=[9x64x96, 1x64x96]"]
    answer = call("plan", config, "--json", *given)
    plan = json.loads(answer.out)
    rows = [(bucket["bucket"], bucket["clips"], bucket["tokens"]) for bucket in plan["buckets"]]
    assert rows == [("9x64x96", 7, 12), ("1x64x96", 1, 6)]
    assert plan["buckets"][0]["forward_tflop"] > plan["buckets"][1]["forward_tflop"] > 0
    assert plan["batches_per_epoch"] == 4 + 1
    assert plan["left_out"] == [{"name": "zero.mp4", "reason": "is empty (0 bytes)"}]
    text = call("plan", config, *given).out
    assert "left out: zero.mp4: is empty (0 bytes)" in text


def test_held_out_samples(call, config, clips):
    plan = json.loads(call("plan", config, "--json", f"data.validation={clips}").out)
    assert (plan["train_samples"], plan["held_out_samples"]) == (7, 7)
    plan = json.loads(call("plan", config, "--json", "data.validation=0.4").out)
    assert plan["train_samples"] + plan["held_out_samples"] == 7 and plan["held_out_samples"] > 0
    assert sum(bucket["clips"] for bucket in plan["buckets"]) == plan["train_samples"]


def test_the_text_says_what_the_json_says(call, config):
    plan = json.loads(call("plan", config, "--json").out)
    answer = call("plan", config)
    assert answer.code == 0
    assert answer.out.splitlines() == [
        f"ltx, lora: trains {plan['trained_parameters']:,} parameters "
        f"({plan['trained_parameters'] / plan['parameters']:.1%} of all)",
        f"  9x64x96: 7 samples of 12 tokens, {plan['buckets'][0]['training_tflop']:.3g} TFLOP each",
        "samples: 7 to train on, 0 held out",
        "steps: 30, which is 7.5 epochs of 4 batches",
        *memory_lines(plan["memory"]),
    ]


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """A row for each phase, in GiB, and no word of a budget where there is none."""
    assert (memory["budget_gib"], memory["fits"], memory["chosen"]) == (None, None, [])
    assert memory["peak_gib"] == max(phase["peak_gib"] for phase in memory["phases"])
    names = ["weights", "gradients", "optimizer", "activations", "peak", "host"]
    assert [list(phase) for phase in memory["phases"]] == [["phase", *(f"{name}_gib" for name in names)]] * 5
    rows = [[phase["phase"], *(f"{phase[f'{name}_gib']:.2f}" for name in names)] for phase in memory["phases"]]
    assert [row[0] for row in rows] == ["encode text", "encode video", "train", "validate", "save"]
    return [f"{first:<16}" + "".join(f"{cell:>13}" for cell in cells) for first, *cells in table(rows, names)]


def table(rows: list[list[str]], names: list[str]) -> list[list[str]]:
    return [["memory, GiB", *names], *([f"  {name}", *cells] for name, *cells in rows)]


def flop_of(call, config, *overrides: str) -> tuple[float, float]:
    (bucket,) = json.loads(call("plan", config, "--json", *overrides).out)["buckets"]
    return bucket["forward_tflop"], bucket["training_tflop"]


def test_the_work_of_a_step_is_that_of_the_run(call, config):
    """Computing activations again is more work than keeping them, more rank too; a larger clip is more of all."""
    kept, again, ranked, larger = (
        flop_of(call, config, *overrides)
        for overrides in (
            ["training.gradient_checkpointing=false"],
            ["training.gradient_checkpointing=true"],
            ["training.gradient_checkpointing=false", "method.rank=8"],
            ["training.gradient_checkpointing=false", "data.buckets=[17x64x96]"],
        )
    )
    assert kept[0] == again[0] and kept[0] < kept[1] < again[1] <= kept[1] + kept[0]
    assert all(more > less for others in (ranked, larger) for more, less in zip(others, kept, strict=True))


def test_no_weights_are_read_and_none_are_written(call, config, model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    whole = json.loads(call("plan", config, "--json").out)
    shutil.rmtree(tmp_path / "run")
    answer = call("plan", config, "--json", f"model.path={bare}")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == whole
    left = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")}
    assert left == {"cache", "cache/files.json"}


def test_a_second_plan_opens_no_clip(call, config, clips, tmp_path, monkeypatch):
    first = call("plan", config, "--json").out
    monkeypatch.setattr("finetrainers.data.index.probe", lambda path: pytest.fail(f"{path} was opened"))
    assert call("plan", config, "--json").out == first


WRONG = [
    (["data.buckets=[10x64x96]"], ["data.buckets 10x64x96", "8k+1", "9x64x96"]),
    (["validation.bucket=9x60x96"], ["validation.bucket 9x60x96", "9x64x96"]),
    (["model.path=nowhere"], ["model.path nowhere"]),
    (["method.target_modules=[nothing]"], ["nothing", "no linear layer"]),
    (["method.target_modules='['"], ["not a regular expression"]),
    (["data.train=nowhere"], ["nowhere"]),
    (["model.task=dance"], ["'dance'", "text-to-video"]),
    (["model.experts=both"], ["model.experts is no option of ltx", "wan"]),
    (["data.conditions=first"], ["data.conditions first with data.buckets 9x64x96", "set model.task"]),
    (["model.task=image-to-video", "data.conditions=prefix-9"], ["data.conditions prefix-9", "first frame or none"]),
    (["objective.loss_weighting=min_snr"], ["min_snr is for models that predict v"]),
]


@pytest.mark.parametrize(("overrides", "parts"), WRONG)
def test_wrong_input(call, config, overrides, parts):
    refusal = call("plan", config, *overrides).refusal
    assert all(part in refusal for part in parts), refusal


def test_a_text_encoder_that_is_trained_counts_too(call, clips, model, tmp_path):
    """As many parameters are said to be trained as training then says."""
    options = ["data.buckets=[9x64x96]", "method={rank: 4, text_encoder: lora}", "training.steps=0"]
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips)},
        validation={"every": 0},
        output=str(tmp_path / "run"),
    )
    planned = json.loads(call("plan", config, *options, "--json").out)
    answer = call("train", config, *options)
    said = f"lora trains {planned['trained_parameters']:,} of {planned['parameters']:,} parameters"
    assert answer.code == 0 and said in answer.err, answer.err


def test_float8_is_planned(call, config):
    """It moves and holds the same parameters, and what a step holds besides is that of its own operations."""
    answers = {}
    for recipe in ("null", "tensorwise"):
        options = ["training.gradient_checkpointing=full", f"method={{name: full, float8_recipe: {recipe}}}"]
        answer = call("plan", config, "--json", *options)
        assert answer.code == 0, answer.err
        answers[recipe] = json.loads(answer.out)
    plain, float8 = answers.values()
    assert float8["trained_parameters"] == plain["trained_parameters"] == float8["parameters"]
    held = [next(phase for phase in each["memory"]["phases"] if phase["phase"] == "train") for each in (plain, float8)]
    assert held[0]["activations_gib"] != held[1]["activations_gib"] > 0
    for name in ("weights_gib", "gradients_gib", "optimizer_gib"):
        assert held[0][name] == held[1][name]
