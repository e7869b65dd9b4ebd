"""LTX-Video: what its versions take, where their tokens lie in time, and frames that are given."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from finetrainers.config.schema import ModelConfig
from finetrainers.errors import UserError
from finetrainers.families.find import find_family
from finetrainers.families.ltx import LTXVideo
from finetrainers.types import Bucket, Condition
from tests.families.ltx_models import ROWS
from tests.families.parity import CPU, random_clip, rates

# As published: transformer/config.json of LTX-Video (0.9.0) and of LTX-Video-0.9.7-dev.
FULL_2B = {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28}
FULL_13B = {"num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
COMMON = {"in_channels": 128, "out_channels": 128, "caption_channels": 4096}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: row.write(tmp_path_factory.mktemp(name)) for name, row in ROWS.items()}


def full_size(folder: Path, target: Path, config: dict) -> LTXVideo:
    """The tiny folder with the published transformer's config in it."""
    shutil.copytree(folder, target)
    path = target / "transformer" / "config.json"
    path.write_text(json.dumps({"_class_name": "LTXVideoTransformer3DModel", **COMMON, **config}))
    return find_family(ModelConfig(path=str(target)))


@pytest.mark.parametrize(("config", "billions", "layers"), [(FULL_2B, 1.923, 28), (FULL_13B, 13.043, 48)])
def test_the_full_size(folders, tmp_path, config, billions, layers):
    family = full_size(folders["ltx-0.9.0"], tmp_path / "full", config)
    with torch.device("meta"):
        transformer = family.build_transformers()["transformer"]
    assert round(sum(parameter.numel() for parameter in transformer.parameters()) / 1e9, 3) == billions
    matches = re.compile(family.defaults("lora")["method.target_modules"]).fullmatch
    found = [name for name, module in transformer.named_modules() if matches(name)]
    assert len(found) == layers * 2 * 4, "two attentions of four projections in each block, and nothing else"
    assert family.num_tokens(Bucket(49, 512, 768)) == 7 * 16 * 24


BUCKETS = [
    ("49x512x768", None),
    ("1x32x32", None),
    ("48x512x768", "49x512x768"),
    ("49x500x768", "49x512x768"),
    ("12x64x70", "9x64x64"),
    ("2x16x16", "1x32x32"),
]


@pytest.mark.parametrize(("size", "nearest"), BUCKETS)
@pytest.mark.parametrize("name", ["ltx-0.9.0", "ltx-0.9.5"])
def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest(folders, name, size, nearest):
    family = ROWS[name].open(folders[name])
    reason = family.check_bucket(Bucket.parse(size))
    assert (reason is None) == (nearest is None)
    if nearest:
        assert "8k+1" in reason and "multiples of 32" in reason and reason.endswith(nearest)
        assert family.check_bucket(Bucket.parse(nearest)) is None


CONDITIONS = [
    ("ltx-0.9.0", "first", "set model.task"),
    ("ltx-0.9.0-i2v", "first", None),
    ("ltx-0.9.0-i2v", "first_last", "before 0.9.5"),
    ("ltx-0.9.0-i2v", "prefix-9", "before 0.9.5"),
    ("ltx-0.9.5", "first_last", "set model.task"),
    ("ltx-0.9.5-i2v", "none", None),
    ("ltx-0.9.5-i2v", "first_last", None),
    ("ltx-0.9.5-i2v", "prefix-9", None),
    ("ltx-0.9.5-i2v", "prefix-8", "8k\\+1"),
    ("ltx-0.9.5-i2v", "prefix-17", "nothing left to learn"),
]


@pytest.mark.parametrize(("name", "condition", "refusal"), CONDITIONS)
def test_frames_that_cannot_be_given_are_refused(folders, name, condition, refusal):
    reason = ROWS[name].open(folders[name]).check_condition(Condition.parse(condition), Bucket(17, 64, 96))
    assert (reason is None) if refusal is None else re.search(refusal, reason)


@pytest.mark.parametrize("name", ["ltx-0.9.0-i2v", "ltx-0.9.5-i2v"])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_the_beginning_of_a_clips_latents_is_that_of_its_beginning(folders, name, num_frames):
    """Why given frames at the beginning need no encoding of their own."""
    family = ROWS[name].open(folders[name])
    encoders = family.load_video_encoders(CPU, torch.float32)
    video = random_clip(Bucket(17, 64, 96))
    whole, part = (family.encode_video(encoders, clip)["mean"] for clip in (video, video[:num_frames]))
    torch.testing.assert_close(whole[:, : part.shape[1]], part)


class Recorder(torch.nn.Module):
    """Keeps what it is called with."""

    dtype = torch.float32

    def forward(self, **call):
        self.call = call
        return (call["hidden_states"],)


@pytest.fixture
def text() -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.zeros(2, 4, 32), "prompt_attention_mask": torch.ones(2, 4, dtype=torch.bool)}


def test_tokens_lie_at_the_start_of_their_frames(folders, text):
    """0.9.5: the first latent at second 0, latent f at (8f - 7) / fps; a last frame by itself at (T - 1) / fps."""
    family, recorder = ROWS["ltx-0.9.5-i2v"].open(folders["ltx-0.9.5-i2v"]), Recorder()
    latents = torch.randn(2, 8, 3, 2, 5)
    given = {
        "frames": torch.tensor([[True, False, False]] * 2),
        "latents": latents + 1,
        "last": torch.randn(2, 8, 1, 2, 5),
    }
    timestep = torch.tensor([300.0, 700.0])
    answer = family.predict(
        {"transformer": recorder}, latents, timestep, text=text, given=given, fps_B=rates(10.0, 20.0)
    )
    call = recorder.call
    seconds = call["video_coords"][:, 0].reshape(2, 4, 10)[:, :, 0]
    torch.testing.assert_close(seconds, torch.tensor([[1.6, 0, 0.1, 0.9], [0.8, 0, 0.05, 0.45]]))
    assert call["video_coords"][0, 1:, 10:20].tolist() == [[0] * 5 + [32] * 5, [0, 32, 64, 96, 128] * 2]
    times = call["timestep"].reshape(2, 4, 10)
    assert (times[:, :2] == 0).all() and (times[0, 2:] == 300).all() and (times[1, 2:] == 700).all()
    tokens = call["hidden_states"].transpose(1, 2).unflatten(2, (4, 2, 5))
    assert torch.equal(tokens, torch.cat([given["last"], latents[:, :, :1] + 1, latents[:, :, 1:]], dim=2))
    assert torch.equal(answer, tokens[:, :, 1:]), "the tokens of the last frame are not part of the answer"


@pytest.mark.parametrize("name", ["ltx-0.9.0", "ltx-0.9.5"])
def test_the_frame_rate_reaches_the_model(folders, text, name):
    family = ROWS[name].open(folders[name])
    transformers = {part: model.eval() for part, model in family.load_transformers(torch.float32).items()}
    latents, timestep = torch.randn(2, 8, 3, 2, 3), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        slow, fast = (
            family.predict(transformers, latents, timestep, text=text, given={}, fps_B=rates(fps, fps))
            for fps in (8.0, 60.0)
        )
    assert not torch.allclose(slow, fast, atol=1e-4)


@pytest.mark.parametrize("name", ["ltx-0.9.0", "ltx-0.9.5"])
def test_longer_clips_are_squeezed_into_the_trained_seconds(folders, text, name):
    """513 frames with interpolation lie where 257 did: the model is told twice the frame rate, sampling included."""
    rope = {"method": "interpolate", "frames": 513}
    plain, longer = ROWS[name].open(folders[name]), ROWS[name].open(folders[name], rope_temporal=rope)
    latents, timestep, calls = torch.randn(2, 8, 3, 2, 3), torch.tensor([300.0, 700.0]), []
    for family, fps in ((longer, 24.0), (plain, 48.0)):
        recorder = Recorder()
        family.predict({"transformer": recorder}, latents, timestep, text=text, given={}, fps_B=rates(fps, fps))
        calls.append(recorder.call)
    key = "video_coords" if name == "ltx-0.9.5" else "rope_interpolation_scale"
    torch.testing.assert_close(calls[0][key], calls[1][key])
    assert longer.notes() == {"rope_temporal": rope} and plain.notes() == {}
    with pytest.raises(UserError, match=r"rope_temporal\.method ntk is not for LTX-Video"):
        ROWS[name].open(folders[name], rope_temporal={"method": "ntk", "frames": 513})
