"""The bundled model is a diffusers folder of the size that was promised, and shows what it is asked for."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LTXPipeline

from benchmarks.base_model.clips import scenes
from benchmarks.base_model.evaluate import RECORD, judge, render
from finetrainers.demo.bundled import BUNDLED_MODEL, copy_bundled_model
from finetrainers.demo.clips import NEON


@pytest.fixture(scope="module")
def pipeline() -> LTXPipeline:
    loaded = DiffusionPipeline.from_pretrained(BUNDLED_MODEL, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_small_and_a_normal_folder(pipeline: LTXPipeline, tmp_path: Path) -> None:
    assert type(pipeline) is LTXPipeline
    weights = list(BUNDLED_MODEL.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"vae", "text_encoder", "transformer"}
    assert sum(path.stat().st_size for path in BUNDLED_MODEL.rglob("*") if path.is_file()) <= 12e6
    assert not [path for path in BUNDLED_MODEL.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert (copy_bundled_model(tmp_path / "model") / "model_index.json").is_file()


@pytest.mark.parametrize(("count", "least"), [(30, 0.85), pytest.param(200, 0.85, marks=pytest.mark.slow)])
def test_it_shows_the_colour_and_motion_asked_for(pipeline: LTXPipeline, count: int, least: float) -> None:
    """Of scenes that none of its clips showed."""
    asked = scenes()[1][:count]
    videos = render(pipeline, [scene.caption for scene in asked], seed=0, steps=20, guidance_scale=3.0)
    found = judge(videos, asked)
    assert found["colour_and_motion"] >= least, found["wrong"]
    # The same videos, asked for other things, are not what was asked for.
    assert judge(np.roll(videos, 1, axis=0), asked)["colour_and_motion"] < 0.3


def test_the_record_is_of_these_weights() -> None:
    record = json.loads(RECORD.read_text())
    weights = BUNDLED_MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    assert record["transformer_sha256"] == sha256(weights.read_bytes()).hexdigest()
    assert record["prompts"] == 200 and record["colour_and_motion"] >= 0.85


def test_the_trigger_is_no_word_that_it_knows(pipeline: LTXPipeline) -> None:
    pieces = pipeline.tokenizer.tokenize(NEON.trigger)
    assert len(pieces) > len(NEON.trigger), "it is spelled, letter by letter"
    assert pipeline.tokenizer.tokenize("a red circle") == ["▁a", "▁red", "▁circle"]
