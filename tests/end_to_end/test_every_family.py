"""Each variant and task of each family through the real command line: trained, loaded by diffusers, resumed, learnt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from finetrainers.demo.clips import render_clips
from finetrainers.families.base import SamplingOptions
from finetrainers.folder import LORA_FILE, read_rows, steps_in
from finetrainers.types import Bucket, Condition
from finetrainers.weights import SECOND
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.end_to_end.saved import trained_tensors
from tests.families.parity import images_of, random_clip, transformers_of
from tests.families.rows import Row
from tests.families.tiny import TINY


class Trained:
    """Runs on one row's model, each made when it is first asked for."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.row, self.root = name, TINY[name], root
        self.model = self.row.write(root / "model")
        self.clips = [self._clips(size) for size in (self.row.bucket, self.row.other_bucket)]

    def _clips(self, size: str) -> Path:
        bucket = Bucket.parse(size)
        frames, height, width = bucket.num_frames + 1, bucket.height, bucket.width
        return render_clips(self.root / size, 2, num_frames=frames, height=height, width=width, fps=16.0).parent

    def settings(self) -> dict[str, Any]:
        row = self.row
        conditions = {} if row.task == "text-to-video" else {"conditions": {row.conditions[0]: 1.0}}
        data = {"train": [str(clips) for clips in self.clips], "buckets": [row.bucket, row.other_bucket]}
        return copy.deepcopy(
            {
                "model": {"path": str(self.model), "task": row.task, **row.options},
                "data": {**data, **conditions, "num_workers": 0, "cache": str(self.root / "cache")},
                "method": {"name": "lora", "rank": 4, "alpha": 8},
                "optimizer": {"lr": 1e-2},
                "training": {"steps": 6, "precision": "fp32", "gradient_checkpointing": False},
                "validation": {"every": 6, "num_inference_steps": 2, "num_videos": 1},
                "checkpoint": {"every": 3},
            }
        )

    def train(self, output: str, *overrides: str) -> Path:
        config = write_config(self.root / f"{output}.yaml", **self.settings(), output=str(self.root / output))
        code, said = run(["train", config, *overrides], self.root / f"{output}.log")
        assert code == 0, said
        return self.root / output

    @property
    def lora(self) -> Path:
        return self.root / "lora" if (self.root / "lora").exists() else self.train("lora")


@pytest.fixture(scope="module", params=TINY)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


def plain_pipeline(trained: Trained) -> Any:
    """Diffusers' own class, with nothing of ours."""
    pipeline = getattr(diffusers, trained.row.pipeline).from_pretrained(trained.model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rendered(row: Row, model: Path, pipeline: Any) -> torch.Tensor:
    bucket, condition = Bucket.parse(row.bucket), Condition.parse(row.conditions[0])
    images = images_of(random_clip(bucket), condition)
    options = SamplingOptions(2, None, 16.0, seed=0)
    return row.open(model).render(pipeline, bucket, options, prompt="a red circle", negative_prompt="", **images)


def test_two_buckets_train_and_render(trained):
    output = trained.lora
    rows = read_rows(output / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert [len(list(folder.glob("*.mp4"))) for folder in steps_in(output / "samples").values()] == [1, 1]
    video_keys = list((trained.root / "cache" / "videos").rglob("*.safetensors"))
    shapes = {tuple(load_file(path)["mean"].shape) for path in video_keys}
    family = trained.row.open(trained.model)
    sizes = (Bucket.parse(trained.row.bucket), Bucket.parse(trained.row.other_bucket))
    assert shapes == {(family.latent_channels, *family.latent_shape(size)) for size in sizes}


def test_the_lora_loads_in_diffusers(trained):
    weights, checkpoint = trained.lora / "weights" / "latest", trained_tensors(trained.lora)
    pipeline = plain_pipeline(trained)
    before = rendered(trained.row, trained.model, pipeline)
    if (weights / LORA_FILE).exists():
        pipeline.load_lora_weights(weights)
    if (weights / SECOND).exists():
        pipeline.load_lora_weights(weights / SECOND, load_into_transformer_2=True)
    compared = 0
    for part, transformer in transformers_of(pipeline).items():
        for name, module in transformer.named_modules():
            if hasattr(module, "scaling") and module.scaling:
                (adapter,) = module.scaling
                a, b = (checkpoint[f"{part}.{name}.lora_{letter}.default.weight"] for letter in "AB")
                torch.testing.assert_close(module.get_delta_weight(adapter), 8 / 4 * b @ a)
                compared += 2
    assert compared == len(checkpoint)
    assert not torch.equal(rendered(trained.row, trained.model, pipeline), before), "it must change what is rendered"


def test_the_whole_transformer_loads_in_diffusers(trained):
    output = trained.train("full", "method={name: full}", "optimizer.lr=1e-3", "validation.every=0")
    checkpoint, pipeline = trained_tensors(output), plain_pipeline(trained)
    before = rendered(trained.row, trained.model, pipeline)
    for part in {name.partition(".")[0] for name in checkpoint}:
        kind = type(getattr(pipeline, part))
        loaded = kind.from_pretrained(output / "weights" / "latest" / part)
        weights = dict(loaded.named_parameters())
        ours = {name.partition(".")[2]: tensor for name, tensor in checkpoint.items() if name.startswith(f"{part}.")}
        assert weights.keys() == ours.keys() and all(torch.equal(weights[name], ours[name]) for name in ours)
        setattr(pipeline, part, loaded)
    assert not torch.equal(rendered(trained.row, trained.model, pipeline), before), "it must change what is rendered"


def test_a_run_cut_in_two_is_the_same_run(trained):
    whole = trained.lora
    trained.train("halves", "training.steps=3")
    halves = trained.train("halves")
    assert exact_rows(halves) == exact_rows(whole)
    ours, theirs = trained_tensors(halves), trained_tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_it_learns_one_clip(trained):
    """The loss of one clip, at fixed noise levels and noise, falls by more than a fifth."""
    if trained.name == "ltx-bundled":
        pytest.skip("test_learning.py trains it on many clips, to a stated loss")
    clip = render_clips(trained.root / "one", 1, num_frames=40, height=96, width=96, fps=16.0).parent
    output = trained.train(
        "learnt",
        "method={name: full}",
        f"data.train={clip}",
        f"data.validation={clip}",
        f"data.buckets=[{trained.row.bucket}]",
        "data.caption_dropout=0",
        "optimizer.lr=3e-3",
        "training.steps=400",
        "validation={every: 400, num_videos: 0}",
        "checkpoint.every=0",
    )
    before, after = [row["validation_loss"] for row in read_rows(output / "metrics.jsonl") if "validation_loss" in row]
    print(trained.row.family, before, after)
    assert after < 0.8 * before
