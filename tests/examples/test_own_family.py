"""What is particular to the example of a family of one's own; what all families promise is tested where theirs is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from finetrainers.cli import main
from finetrainers.demo.clips import render_clips
from finetrainers.errors import UserError
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.types import Bucket
from tests.end_to_end.runs import write_config
from tests.examples.mochi_model import ROWS
from tests.families.parity import CPU, PROMPT, random_clip, recorded

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_family"
BUCKET = Bucket.parse(ROWS["own-family"].bucket)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: row.write(tmp_path_factory.mktemp("models") / name) for name, row in ROWS.items()}


@pytest.fixture
def family(folders: dict[str, Path]) -> Family:
    return ROWS["own-family"].open(folders["own-family"])


def test_it_is_short():
    assert len((EXAMPLE / "mochi.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize(("name", "num_tokens"), [("own-family", 0), ("own-family-empty-prompt-kept", 1)])
def test_a_dropped_caption_is_what_the_pipeline_guides_away_from(folders, name, num_tokens):
    """As model_index.json says it: an empty prompt is no token, or the one that ends a text."""
    family = ROWS[name].open(folders[name])
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    calls = recorded(pipeline)
    family.render(pipeline, BUCKET, SamplingOptions(2, 2.0, 30.0, seed=0), prompt=PROMPT, negative_prompt="")
    # Beside another caption, as the pipeline never embeds it.
    tokens = family.tokenize(family.load_tokenizers(), ["", PROMPT])
    with torch.no_grad():
        text = family.embed(family.load_text_encoders(CPU, torch.float32), tokens)
    torch.testing.assert_close(text["prompt_embeds"], calls[0][1]["encoder_hidden_states"], rtol=1e-5, atol=3e-5)
    assert torch.equal(text["prompt_attention_mask"], calls[0][1]["encoder_attention_mask"])
    assert text["prompt_attention_mask"][0].sum() == num_tokens


def test_bf16_keeps_the_latents(family):
    """An encoder that was given pixels in bf16 would make something else of them."""
    full, half = (
        family.encode_video(family.load_video_encoders(CPU, dtype), random_clip(BUCKET))["mean"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize(
    ("size", "nearest"),
    [("163x480x848", None), ("1x16x16", None), ("12x480x848", "13x480x848"), ("13x480x840", "13x480x832")],
)
def test_sizes(family, size, nearest):
    refusal = family.check_bucket(Bucket.parse(size))
    assert refusal is None if nearest is None else refusal.endswith(f"the nearest is {nearest}")


def test_a_token_is_one_latent_in_time_and_two_in_space(family):
    assert family.num_tokens(Bucket(163, 480, 848)) == 28 * 30 * 53


def test_adapters_go_to_the_attention_of_every_block_and_nowhere_else(family):
    with torch.device("meta"):
        modules = family.build_transformers()["transformer"].named_modules()
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    targets = family.defaults("lora")["method.target_modules"]
    assert [name for name in linear if re.fullmatch(targets, name)] == [name for name in linear if ".attn1." in name]


def test_one_step_is_refused(family):
    with pytest.raises(UserError, match="at least 2 denoising steps"):
        family.render(None, BUCKET, SamplingOptions(1, None, 30.0, seed=0), prompt=PROMPT)


def test_plan_and_sample_take_it_too(folders, tmp_path, capsys):
    model, own = folders["own-family"], "examples.own_family.mochi.Mochi"
    clips = render_clips(tmp_path / "clips", 2, num_frames=14, height=32, width=48, fps=16.0).parent
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(model), "family": own},
        data={"train": str(clips), "buckets": ["13x32x48"]},
        output=str(tmp_path / "run"),
    )
    assert main(["plan", str(config)]) == 0
    said = capsys.readouterr().out
    assert "13x32x48: 2 samples of 18 tokens\n" in said, "its work is not counted, and nothing is made up"
    assert "memory: cannot be told without the weights\n" in said
    assert main(["plan", str(config), "memory.budget=24GB"]) == 2
    assert "memory.budget: what mochi holds cannot be told without its weights" in capsys.readouterr().err
    options = ["--size", "7x32x48", "--steps", "2", "--precision", "fp32", "--output", str(tmp_path / "videos")]
    assert main(["sample", str(model), "--family", own, "--prompt", PROMPT, *options]) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
