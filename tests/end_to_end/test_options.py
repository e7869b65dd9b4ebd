"""No dead options: each changes what a run computes or leaves on disk."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetrainers.families.find import find_family
from finetrainers.folder import read_rows, steps_in
from finetrainers.hashing import file_digest
from tests.end_to_end.runs import exact_rows, run, write_config

CHANGES_NUMBERS = [
    "data.fps=8",
    "data.window=middle",
    "data.trigger=BW_STYLE",
    "data.caption_dropout=1.0",
    "method.rank=2",
    "method.alpha=1",
    "method.dropout=0.5",
    "method.target_modules=[to_q]",
    "objective.timestep_sampling=uniform",
    "objective.timestep_sampling=logit_normal",
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


def run_with(base, tmp_path: Path, override: str) -> Path:
    settings = copy.deepcopy(base[0])
    config = write_config(tmp_path / "c.yaml", **settings)
    code, said = run(["train", config, override, f"output={tmp_path / 'run'}"], tmp_path / "log")
    assert code == 0, said
    return tmp_path / "run"


@pytest.mark.parametrize("override", CHANGES_NUMBERS)
def test_it_changes_the_numbers(base, tmp_path, override):
    assert exact_rows(run_with(base, tmp_path, override)) != exact_rows(base[1])


@pytest.mark.parametrize("override", CHANGES_VIDEOS)
def test_it_changes_the_videos_and_no_number(base, tmp_path, override):
    output = run_with(base, tmp_path, override)
    assert exact_rows(output) == exact_rows(base[1])

    def videos(root: Path) -> set[str]:
        return {file_digest(path) for path in (root / "samples" / "step-00000003").glob("*.mp4")}

    assert videos(output) and videos(output).isdisjoint(videos(base[1]))


def newest_state(output: Path) -> str:
    return (output / "checkpoints" / "step-00000003" / "state.json").read_text()


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
]


@pytest.mark.parametrize(("override", "shows"), EFFECTS, ids=[override for override, _ in EFFECTS])
def test_it_shows_on_disk(base, tmp_path, override, shows):
    assert shows(run_with(base, tmp_path, override))


@pytest.mark.parametrize("tiling", [False, True])
def test_vae_tiling_reaches_the_encoder(model, tiling):
    family = find_family(str(model), revision=None, task="text-to-video", vae_tiling=tiling)
    vae = family.load_video_encoder(torch.device("cpu"), torch.float32)
    assert vae.use_tiling is tiling
    assert vae.use_framewise_encoding is tiling and vae.use_framewise_decoding is tiling


def test_every_option_is_in_the_written_config(base):
    written = yaml.safe_load((base[1] / "config.yaml").read_text())
    assert written["objective"]["timestep_sampling"] == "shifted_logit_normal", "the family's default is filled in"
    assert all(value is not None for value in written["optimizer"].values())
