"""Runs whose blocks are streamed give the numbers of plain runs, to the bit, and what cannot stream is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from finetrainers.cli import main
from finetrainers.demo.clips import render_clips
from finetrainers.types import Bucket
from tests.end_to_end.runs import exact_rows, write_config
from tests.families.deep import write_deep
from tests.families.tiny import TINY

ROWS = ["ltx-0.9.5-i2v", "cogvideox-5b", "hunyuan", "hunyuan-i2v", "wan-2.2-a14b"]
METHODS = {"lora": "method={name: lora, rank: 4, alpha: 8, dropout: 0.1}", "full": "method={name: full}"}


class Deep:
    """Runs on a row's model with more blocks than the ring takes."""

    def __init__(self, name: str, root: Path) -> None:
        self.row, self.root = TINY[name], root
        self.model = write_deep(name, root / "model")
        self.clips = []
        for size in (self.row.bucket, self.row.other_bucket):
            bucket = Bucket.parse(size)
            shape = {"num_frames": bucket.num_frames + 1, "height": bucket.height, "width": bucket.width}
            self.clips.append(str(render_clips(root / size, 2, fps=16.0, **shape).parent))

    def settings(self) -> dict[str, Any]:
        row = self.row
        given = {} if row.task == "text-to-video" else {"conditions": {row.conditions[0]: 1.0}}
        return copy.deepcopy(
            {
                "model": {"path": str(self.model), "task": row.task, **row.options},
                "data": {
                    "train": self.clips,
                    "buckets": [row.bucket, row.other_bucket],
                    "validation": 0.25,
                    "num_workers": 0,
                    "cache": str(self.root / "cache"),
                    **given,
                },
                "optimizer": {"lr": 1e-2},
                "training": {
                    "steps": 4,
                    "precision": "fp32",
                    "max_grad_norm": 0.01,
                    "gradient_accumulation_steps": 2,
                },
                "validation": {"every": 4, "num_inference_steps": 2, "num_videos": 1, "timesteps": 1},
                "checkpoint": {"every": 2},
            }
        )

    def config(self, output: str) -> str:
        return str(write_config(self.root / f"{output}.yaml", **self.settings(), output=str(self.root / output)))

    def train(self, output: str, *overrides: str) -> Path:
        assert main(["train", self.config(output), *overrides]) == 0
        return self.root / output


@pytest.fixture(scope="module", params=ROWS)
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep("ltx-0.9.0", tmp_path_factory.mktemp("ltx"))


def assert_same(one: Path, other: Path) -> None:
    """Losses, gradient norms, held-out losses, the weights to take away and the sample videos, to the bit."""
    assert exact_rows(one) == exact_rows(other)
    for pattern in ("weights/latest/**/*.safetensors", "samples/**/*.mp4"):
        files, twins = (sorted(run.glob(pattern)) for run in (one, other))
        assert [path.relative_to(one) for path in files] == [path.relative_to(other) for path in twins] != []
        for path, twin in zip(files, twins, strict=True):
            assert path.read_bytes() == twin.read_bytes(), path


@pytest.mark.parametrize("method", METHODS)
def test_streamed_run_is_the_plain_run(deep, method):
    """Buckets mixed, gradients accumulated and clipped; stopped half way, and resumed with other blocks streamed."""
    chosen = METHODS[method]
    plain = deep.train(f"plain-{method}", chosen)
    streamed = f"streamed-{method}"
    deep.train(streamed, chosen, "memory.stream_blocks=all", "training.steps=2")
    deep.train(streamed, chosen, "memory.stream_blocks=3")
    assert_same(plain, deep.root / streamed)
    pipeline = DiffusionPipeline.from_pretrained(deep.model)
    if method == "lora":
        pipeline.load_lora_weights(deep.root / streamed / "weights" / "latest", use_safetensors=True)
    else:
        type(pipeline.transformer).from_pretrained(deep.root / streamed / "weights" / "latest" / "transformer")
