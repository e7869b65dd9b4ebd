"""No dead options: each changes what a run computes or leaves on disk."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from finetrainers.config.schema import ModelConfig
from finetrainers.families.find import find_family
from finetrainers.folder import read_rows, steps_in
from finetrainers.hashing import file_digest
from tests.end_to_end.runs import exact_rows, run, write_config

CHANGES_NUMBERS = [
    "data.fps=8",
    "data.window=middle",
    "data.trigger=BW_STYLE",
    "data.caption_dropout=1.0",
    "model.task=image-to-video",
    "model.rope_temporal={method: interpolate, frames: 513}",
    "method.rank=2",
    "method.alpha=1",
    "method.dropout=0.5",
    "method.target_modules=[to_q]",
    "method.text_encoder=lora",
    "objective.timestep_sampling=uniform",
    "objective.timestep_sampling=logit_normal",
    "objective.timestep_sampling=mode",
    "objective.shift=3",
    "objective.logit_std=0.2",
    "objective.uniform_share=1.0",
    "optimizer.lr=3e-3",
    "optimizer.betas=[0.5, 0.9]",
    "optimizer.eps=0.1",
    "optimizer.weight_decay=100.0",
    "optimizer.lr_scheduler=linear",
    "optimizer={lr: 1e-3, lr_scheduler: constant_with_warmup, lr_warmup_steps: 2}",
    "training.batch_size=1",
    "training.gradient_accumulation_steps=2",
    "training.seed=1",
    "training.precision=bf16",
    "training.max_grad_norm=0.001",
    "validation.timesteps=2",
]
IMAGES = "model.task=image-to-video"
CHANGES_NUMBERS_OF = [
    (IMAGES, "data.conditions=first"),
    (IMAGES, "data.conditions=none"),
    ("objective.timestep_sampling=logit_normal", "objective.logit_mean=1.5"),
    ("objective.timestep_sampling=mode", "objective.mode_scale=-0.5"),
]
"""Options that say nothing without another one, and that one."""
CHANGES_VIDEOS = [
    "validation.num_inference_steps=3",
    "validation.guidance_scale=9.0",
    "validation.negative_prompt=blurry",
    "validation.bucket=9x32x64",
    "validation.prompts=[something else]",
]


@pytest.fixture(scope="module")
def base(model, clips, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A short run to compare with; the cache is shared with it."""
    folder = tmp_path_factory.mktemp("base")
    settings = {
        "model": {"path": str(model)},
        "data": {"train": str(clips), "buckets": ["9x64x96"], "validation": 0.2, "cache": str(folder / "cache")},
        "method": {"name": "lora", "rank": 4},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 3, "batch_size": 2, "precision": "fp32"},
        "validation": {"every": 3, "num_inference_steps": 2, "num_videos": 1},
        "output": str(folder / "run"),
    }
    code, said = run(["train", write_config(folder / "c.yaml", **settings)], folder / "log")
    assert code == 0, said
    return settings, folder / "run"


def run_with(base, tmp_path: Path, *overrides: str, output: str = "run") -> Path:
    settings = copy.deepcopy(base[0])
    config = write_config(tmp_path / "c.yaml", **settings)
    code, said = run(["train", config, *overrides, f"output={tmp_path / output}"], tmp_path / "log")
    assert code == 0, said
    return tmp_path / output


@pytest.mark.parametrize("override", CHANGES_NUMBERS)
def test_it_changes_the_numbers(base, tmp_path, override):
    assert exact_rows(run_with(base, tmp_path, override)) != exact_rows(base[1])


@pytest.fixture(scope="module")
def beside(base, tmp_path_factory) -> Callable[[str], Path]:
    """A run with one more option, made when it is first asked for."""
    made: dict[str, Path] = {}

    def find(given: str) -> Path:
        if given not in made:
            made[given] = run_with(base, tmp_path_factory.mktemp("beside"), given)
        return made[given]

    return find


@pytest.mark.parametrize(("given", "override"), CHANGES_NUMBERS_OF)
def test_it_changes_the_numbers_of_a_run_with_another_option(base, beside, tmp_path, given, override):
    assert exact_rows(run_with(base, tmp_path, given, override)) != exact_rows(beside(given))


def videos(root: Path) -> set[str]:
    return {file_digest(path) for path in (root / "samples" / "step-00000003").glob("*.mp4")}


@pytest.mark.parametrize("override", CHANGES_VIDEOS)
def test_it_changes_the_videos_and_no_number(base, tmp_path, override):
    output = run_with(base, tmp_path, override)
    assert exact_rows(output) == exact_rows(base[1])
    assert videos(output) and videos(output).isdisjoint(videos(base[1]))


def test_validation_images_are_what_the_videos_begin_with(base, beside, tmp_path):
    """Each prompt has its own; the same prompt with another image is another video, and no number changes."""
    prompts = "validation.prompts=[one, two]"
    found = []
    for number, colours in enumerate([("red", "blue"), ("red", "green")]):
        paths = [tmp_path / f"{colour}.png" for colour in colours]
        for path, colour in zip(paths, colours, strict=True):
            Image.new("RGB", (120, 80), colour).save(path)
        images = f"validation.images=[{', '.join(map(str, paths))}]"
        output = run_with(base, tmp_path, IMAGES, prompts, images, output=f"run-{number}")
        assert exact_rows(output) == exact_rows(beside(IMAGES))
        found.append([file_digest(path) for path in sorted((output / "samples" / "step-00000003").glob("*.mp4"))])
    (red, blue), (same_red, green) = found
    assert red == same_red and len({red, blue, green}) == 3
    config = tmp_path / "c.yaml"
    code, said = run(["train", config, IMAGES, prompts, f"output={tmp_path / 'other'}"], tmp_path / "log")
    assert code == 2 and "validation.images must name one image or clip for each of the 2" in said, said


def newest_state(output: Path) -> str:
    return (output / "checkpoints" / "step-00000003" / "tensors" / "optimizer.json").read_text()


EFFECTS: list[tuple[str, Callable[[Path], bool]]] = [
    ("validation.num_videos=0", lambda output: not (output / "samples").exists()),
    ("validation.num_videos=2", lambda output: "step-00000003" in {p.name for p in (output / "samples").iterdir()}),
    ("validation.every=0", lambda output: not any("validation_loss" in r for r in read_rows(output / "metrics.jsonl"))),
    ("validation.every=1", lambda output: len(steps_in(output / "samples")) == 4),
    ("checkpoint={every: 1, keep: 2}", lambda output: list(steps_in(output / "checkpoints")) == [2, 3]),
    ("checkpoint={every: 1, keep: null}", lambda output: list(steps_in(output / "checkpoints")) == [1, 2, 3]),
    ("checkpoint={every: 1, keep_weights: 2}", lambda output: list(steps_in(output / "weights")) == [2, 3]),
    ("tracking.trackers=tensorboard", lambda output: any((output / "tensorboard").iterdir())),
    ("training.steps=0", lambda output: list(steps_in(output / "weights")) == [0]),
    ("optimizer.name=adamw_8bit", lambda output: "state1" in newest_state(output)),
    ("optimizer.name=adafactor", lambda output: "exp_avg_sq_row" in newest_state(output)),
    ("optimizer.name=muon", lambda output: "momentum_buffer" in newest_state(output)),
]


@pytest.mark.parametrize(("override", "shows"), EFFECTS, ids=[override for override, _ in EFFECTS])
def test_it_shows_on_disk(base, tmp_path, override, shows):
    assert shows(run_with(base, tmp_path, override))


@pytest.mark.parametrize("tiling", [False, True])
def test_vae_tiling_reaches_the_encoder(model, tiling):
    family = find_family(ModelConfig(path=str(model)), vae_tiling=tiling)
    vae = family.load_video_encoders(torch.device("cpu"), torch.float32)["vae"]
    assert vae.use_tiling is tiling
    assert vae.use_framewise_encoding is tiling and vae.use_framewise_decoding is tiling


def test_every_option_is_in_the_written_config(base):
    written = yaml.safe_load((base[1] / "config.yaml").read_text())
    assert written["objective"]["timestep_sampling"] == "shifted_logit_normal", "the family's default is filled in"
    assert all(value is not None for value in written["optimizer"].values())
