"""What the training step hands to the transformer, against what the diffusers pipeline hands to it."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from finetrainers.errors import UserError
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.families.find import all_families, find_family
from finetrainers.objectives import FlowMatching
from finetrainers.types import Bucket
from tests.families.tiny import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=TINY)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, str]:
    row = TINY[request.param]
    folder = row.write(tmp_path_factory.mktemp("model"))
    return find_family(str(folder), revision=None, task="text-to-video"), request.param


def captured(transformer: torch.nn.Module) -> list[dict]:
    calls: list[dict] = []
    transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_every_family_has_a_row():
    assert {family.name for family in all_families()} == {row.family for row in TINY.values()}


@pytest.mark.parametrize("fps", [25.0, 8.0, 29.97])
def test_training_calls_the_transformer_as_the_pipeline_does(opened, fps):
    family, row = opened
    bucket = Bucket.parse(TINY[row].bucket)
    prompt = "a red circle moves, and stops"
    pipeline = getattr(diffusers, TINY[row].pipeline).from_pretrained(family.folder)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    calls = captured(transformer)
    family.render(pipeline, bucket, SamplingOptions(2, 1.0, fps, seed=3), prompt=prompt)
    theirs = calls[-1]
    assert len(calls) == 2

    frames, height, width = family.latent_shape(bucket)
    latents = theirs["hidden_states"].transpose(1, 2).unflatten(2, (frames, height, width))
    encoded = family.encode_text(family.load_text_encoder(CPU, torch.float32), [prompt])[0]
    text = {name: tensor[None] for name, tensor in encoded.items()}
    family.predict(transformer, latents, theirs["timestep"].flatten(), text=text, fps=[fps])
    ours = calls[-1]

    meant = {name: value for name, value in theirs.items() if name not in ("attention_kwargs", "return_dict")}
    assert meant.keys() == {name for name in ours if name != "return_dict"}
    for name, value in meant.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype, name
            # Two copies of the same weights differ in the last bits: CPU kernels round by memory alignment.
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-5, msg=name)
        else:
            assert ours[name] == value, name


def test_the_layout_of_tokens_is_the_pipelines(opened):
    family, row = opened
    kind = getattr(diffusers, TINY[row].pipeline)
    latents = torch.randn(2, 8, 3, 2, 5)
    given = {}

    class Recorder(torch.nn.Module):
        dtype = torch.float32

        def forward(self, hidden_states, **_):
            given["tokens"] = hidden_states
            return (hidden_states,)

    text = {"prompt_embeds": torch.zeros(2, 4, 32), "prompt_attention_mask": torch.ones(2, 4, dtype=torch.bool)}
    answer = family.predict(Recorder(), latents, torch.ones(2), text=text, fps=[24.0, 24.0])
    assert torch.equal(given["tokens"], kind._pack_latents(latents))
    assert torch.equal(answer, latents)


@pytest.mark.parametrize("fps", [(8.0, 8.0), (8.0, 24.0)])
def test_a_batch_gives_each_clip_its_own_time(opened, fps):
    family, _ = opened
    transformer = family.load_transformer(torch.float32).eval()
    latents, timestep = torch.randn(2, 8, 3, 2, 3), torch.tensor([300.0, 700.0])
    text = {
        "prompt_embeds": torch.randn(2, 6, 32),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool(),
    }
    with torch.no_grad():
        together = family.predict(transformer, latents, timestep, text=text, fps=fps)
        for index in range(2):
            one = slice(index, index + 1)
            cut = {name: tensor[one] for name, tensor in text.items()}
            alone = family.predict(transformer, latents[one], timestep[one], text=cut, fps=[fps[index]])
            torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
        other = family.predict(transformer, latents, timestep, text=text, fps=(60.0, 60.0))
    assert not torch.allclose(together, other, atol=1e-4), "the frame rate must reach the model"


def test_latents_are_normalised_as_the_pipeline_denormalises_them(opened):
    family, row = opened
    vae = family.load_video_encoder(CPU, torch.float32)
    video = torch.randint(0, 256, (17, 3, 64, 96), dtype=torch.uint8)
    encoded = family.encode_video(vae, video)
    pixels = video.permute(1, 0, 2, 3)[None].float() / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
    normalised = (encoded["mean"] - encoded["shift"].view(-1, 1, 1, 1)) * encoded["scale"].view(-1, 1, 1, 1)
    kind = getattr(diffusers, TINY[row].pipeline)
    back = kind._denormalize_latents(normalised[None], vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    torch.testing.assert_close(back, raw)
    assert encoded["mean"].shape[1:] == family.latent_shape(Bucket(17, 64, 96))
    assert not torch.allclose(normalised, encoded["mean"], atol=0.05), "the tiny model must be able to tell"


class Oracle(torch.nn.Module):
    """Knows the clean latents and answers with the ideal prediction for the noisy input that it is given."""

    dtype = torch.float32

    def __init__(self, latents_BCFHW):
        super().__init__()
        self.clean_BSC = latents_BCFHW.flatten(2).transpose(1, 2)
        self.noise = []

    def forward(self, hidden_states, timestep, **_):
        sigma = timestep.reshape(len(hidden_states), 1, 1) / 1000
        noise = (hidden_states - (1 - sigma) * self.clean_BSC) / sigma
        self.noise.append(noise)
        return (noise - self.clean_BSC,)


def test_the_ideal_prediction_has_no_loss(opened):
    family, _ = opened
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 8, 4, 6, 5, generator=generator) * 2 + 0.5
    oracle, objective = Oracle(latents), FlowMatching(sample_sigma=lambda tokens, generator: 0.5)
    text = {"prompt_embeds": torch.zeros(4, 4, 32), "prompt_attention_mask": torch.ones(4, 4, dtype=torch.bool)}
    for sigma in (0.05, 0.3, 0.7, 1.0):
        noise = torch.randn(latents.shape, generator=generator)
        noised = objective.noise(latents, noise, torch.full((4,), sigma))
        answer = family.predict(oracle, noised.input_BCFHW, noised.timestep_B, text=text, fps=[25.0] * 4)
        assert (answer - noised.target_BCFHW).square().mean() < 1e-6
    seen = torch.cat([noise.flatten() for noise in oracle.noise])
    assert abs(seen.mean()) < 4 / len(seen) ** 0.5
    assert abs(seen.var() - 1) < 4 * (2 / len(seen)) ** 0.5


BUCKETS = [
    ("49x512x768", None),
    ("1x32x32", None),
    ("48x512x768", "49x512x768"),
    ("49x500x768", "49x512x768"),
    ("12x64x70", "9x64x64"),
    ("2x16x16", "1x32x32"),
]


@pytest.mark.parametrize(("size", "nearest"), BUCKETS)
def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest(opened, size, nearest):
    reason = opened[0].check_bucket(Bucket.parse(size))
    assert (reason is None) == (nearest is None)
    if nearest:
        assert "8k+1" in reason and "multiples of 32" in reason and reason.endswith(nearest)
        assert opened[0].check_bucket(Bucket.parse(nearest)) is None


def test_a_model_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        find_family(str(tmp_path / "nowhere"), revision=None, task="text-to-video")
    with pytest.raises(UserError, match=r"no model_index\.json"):
        find_family(str(tmp_path), revision=None, task="text-to-video")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        find_family(str(tmp_path), revision=None, task="text-to-video")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"FluxPipeline, which is not supported; supported are: ltx"):
        find_family(str(tmp_path), revision=None, task="text-to-video")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    with pytest.raises(UserError, match="the folder vae/ of a ltx model is missing"):
        find_family(str(tmp_path), revision=None, task="text-to-video")


def test_an_unknown_task_names_the_known_ones(opened):
    with pytest.raises(UserError, match=r"'dance' is not supported for ltx; supported are: text-to-video"):
        find_family(str(opened[0].folder), revision=None, task="dance")


def test_a_hub_id_is_found_in_the_hubs_own_cache(opened, tmp_path, monkeypatch):
    family, _ = opened
    snapshot = tmp_path / "models--someone--tiny-ltx" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(family.folder)
    (tmp_path / "models--someone--tiny-ltx" / "refs").mkdir()
    (tmp_path / "models--someone--tiny-ltx" / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find_family("someone/tiny-ltx", revision=None, task="text-to-video")
    assert found.load_transformer(torch.float32).config.num_layers == 2
    with pytest.raises(UserError, match="the hub did not give it"):
        find_family("someone/other", revision=None, task="text-to-video")
