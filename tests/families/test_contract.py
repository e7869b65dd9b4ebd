"""What every family promises, checked for each variant and task: a family without a row fails the suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetrainers.config.schema import LoraOptions, ObjectiveConfig
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.families.find import all_families
from finetrainers.families.parts import dtype_of, put_given
from finetrainers.hashing import generator_for
from finetrainers.latents import draw_latents
from finetrainers.methods.lora import Lora
from finetrainers.objectives import build_objective
from finetrainers.types import Batch, Bucket, Condition
from tests.families.parity import (
    CPU,
    PROMPT,
    Oracle,
    compare_calls,
    images_of,
    inputs_of,
    means_for_draws,
    random_clip,
    rates,
    transformers_of,
)
from tests.families.rows import Row
from tests.families.tiny import OURS, TINY

CASES = [(name, condition) for name, row in TINY.items() for condition in row.conditions]


def build(family: Family) -> Any:
    options = ObjectiveConfig(timestep_sampling="uniform", shift=1.0)
    return build_objective(options, alphas_cumprod=family.alphas_cumprod(), noise_range=family.noise_range)


def oracles(row: Row, family: Family, latents: torch.Tensor) -> dict[str, Oracle]:
    with torch.device("meta"):
        built = family.build_transformers()
    return {name: Oracle(row, latents, family.alphas_cumprod(), model.config) for name, model in built.items()}


def test_every_family_and_task_has_a_row():
    for family in all_families():
        rows = [row for row in OURS.values() if row.family == family.name]
        assert {row.task for row in rows} == set(family.tasks), family.name
    assert {row.family for row in OURS.values()} == {family.name for family in all_families()}


@pytest.mark.parametrize(("name", "condition"), CASES)
@pytest.mark.parametrize(("fps", "prompt"), [(25.0, "a red circle moves, and stops"), (8.0, "")])
def test_training_calls_the_transformer_as_the_pipeline_does(folders, name, condition, fps, prompt):
    compare_calls(TINY[name], folders[name], Condition.parse(condition), fps=fps, prompt=prompt)


@pytest.mark.parametrize("name", TINY)
def test_the_encoder_is_given_pixels_as_the_pipeline_prepares_them(folders, name, monkeypatch):
    row = TINY[name]
    family, bucket, given = row.open(folders[name]), Bucket.parse(row.bucket), []
    encoders, clip = family.load_video_encoders(CPU, torch.float32), random_clip(bucket)
    encode = encoders["vae"].encode
    monkeypatch.setattr(encoders["vae"], "encode", lambda pixels: given.append(pixels) or encode(pixels))
    family.encode_video(encoders, clip)
    frames = images_of(clip, Condition(bucket.num_frames))["image"]
    torch.testing.assert_close(given, [family.load_pipeline(torch.float32).video_processor.preprocess_video(frames)])


@pytest.mark.parametrize(("name", "condition"), CASES)
def test_the_ideal_prediction_has_no_loss(folders, name, condition):
    """Through the method's own loss, at all noise levels, for a batch of two clips."""
    row = TINY[name]
    family, bucket = row.open(folders[name]), Bucket.parse(row.bucket)
    with torch.device("meta"):
        is_pair = len(family.build_transformers()) > 1
    # Which rows an expert is asked about the oracle does not know, so a pair of experts gets the same clip twice.
    seeds = (0, 0) if is_pair else (0, 1)
    clips = [inputs_of(family, random_clip(bucket, seed=seed), Condition.parse(condition)) for seed in seeds]
    latents = torch.cat([latents for latents, _ in clips])
    known = oracles(row, family, latents[:1] if is_pair else latents)
    stacked = {
        kind: {key: torch.cat([inputs[kind][key] for _, inputs in clips]) for key in clips[0][1][kind]}
        for kind in ("text", "given")
    }
    method = Lora(family, build(family), LoraOptions(), dtype=torch.float32)
    low, high = family.noise_range
    for share in (0.05, 0.3, 0.7, 0.97):
        level = low + (high - low) * share
        batch = Batch(
            latents_BCFHW=latents,
            noise_BCFHW=torch.randn(latents.shape, generator=generator_for(0, "noise", name, str(level))),
            level_B=torch.tensor([level, high - (high - low) * 0.2]),
            fps_B=rates(25.0, 8.0),
            names=("one", "two"),
            num_tokens=0,
            **stacked,
        )
        loss = method.loss(known, batch)
        assert loss.shape == (2,) and loss.max() < 1e-5


@pytest.mark.parametrize(("name", "condition"), [(name, row.conditions[0]) for name, row in TINY.items()])
def test_the_pipeline_driven_by_the_ideal_prediction_gives_back_the_clip(folders, name, condition):
    """What reaches the decoder is what the encoder gave: normalisation, padding and sign are the pipeline's own."""
    row = TINY[name]
    if row.options.get("experts") not in (None, "both"):
        pytest.skip("the other expert is not an oracle")
    family, bucket = row.open(folders[name]), Bucket.parse(row.bucket)
    video = random_clip(bucket)
    latents, inputs = inputs_of(family, video, Condition.parse(condition))
    encoded = family.encode_video(family.load_video_encoders(CPU, torch.float32), video)
    shift, scale = (encoded[name].view(-1, 1, 1, 1) for name in ("shift", "scale"))
    # A given frame that was encoded by itself is not quite the clip's own.
    expected = put_given(encoded["mean"][None], {**inputs["given"], "latents": _raw(inputs["given"], shift, scale)})[0]
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    known = oracles(row, family, latents)
    for part, transformer in transformers_of(pipeline).items():
        transformer.forward = known.get(part, next(iter(known.values()))).forward
    if "timestep_conditioning" in pipeline.vae.config:
        # Or the pipeline adds noise to what it decodes.
        pipeline.vae.register_to_config(timestep_conditioning=False)
    decoded = []

    def record(latents: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        decoded.append(latents)
        raise DecodingError

    pipeline.vae.decode = record
    with means_for_draws(), pytest.raises(DecodingError):
        given = images_of(video, Condition.parse(condition))
        settings = SamplingOptions(8, 1.0, 25.0, seed=3)
        family.render(pipeline, bucket, settings, **given, prompt=PROMPT, negative_prompt="", **row.call)
    expected = expected[:, expected.shape[1] - decoded[0].shape[2] :]
    torch.testing.assert_close(decoded[0][0].float(), expected, rtol=1e-3, atol=2e-3)


def _raw(given: dict[str, torch.Tensor], shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Given latents as the decoder takes them."""
    return given["latents"] / scale + shift if "latents" in given else torch.zeros(())


class DecodingError(Exception):
    """Raised where the decoder would begin."""


@pytest.mark.parametrize(("name", "condition"), CASES)
def test_a_batch_gives_each_clip_its_own_answer(folders, name, condition):
    row = TINY[name]
    family, bucket = row.open(folders[name]), Bucket.parse(row.bucket)
    transformers = {part: model.eval() for part, model in family.load_transformers(torch.float32).items()}
    clips = [inputs_of(family, random_clip(bucket, seed=seed), Condition.parse(condition)) for seed in range(2)]
    latents = torch.cat([latents for latents, _ in clips])
    low, high = family.noise_range
    timestep = torch.tensor([int(1000 * (low + (high - low) * share)) for share in (0.3, 0.95)]).float()
    together_inputs = {
        kind: {key: torch.cat([inputs[kind][key] for _, inputs in clips]) for key in clips[0][1][kind]}
        for kind in ("text", "given")
    }
    with torch.no_grad():
        together = family.predict(transformers, latents, timestep, fps_B=rates(8.0, 24.0), **together_inputs)
        for index, (_, inputs) in enumerate(clips):
            one = slice(index, index + 1)
            alone = family.predict(transformers, latents[one], timestep[one], fps_B=rates((8.0, 24.0)[index]), **inputs)
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)
    assert together.shape == latents.shape and together.dtype == torch.float32


@pytest.mark.parametrize("name", TINY)
def test_latents_have_the_announced_shape_and_are_normalised(folders, name):
    row = TINY[name]
    family = row.open(folders[name])
    encoders = family.load_video_encoders(CPU, torch.float32)
    for size in (row.bucket, row.other_bucket):
        bucket = Bucket.parse(size)
        assert family.check_bucket(bucket) is None
        encoded = family.encode_video(encoders, random_clip(bucket))
        assert encoded["mean"].shape == encoded["logvar"].shape
        assert tuple(encoded["mean"].shape) == (family.latent_channels, *family.latent_shape(bucket))
        normalised = draw_latents(encoded, None)
        assert not torch.allclose(normalised, encoded["mean"], atol=0.02), "the tiny model must be able to tell"


@pytest.mark.parametrize(("name", "condition"), CASES)
def test_blank_inputs_have_the_shapes_of_real_ones(folders, name, condition):
    row = TINY[name]
    family, bucket, wanted = row.open(folders[name]), Bucket.parse(row.bucket), Condition.parse(condition)
    latents, inputs = inputs_of(family, random_clip(bucket), wanted)
    blank = family.given(wanted, torch.zeros_like(latents[0]), family.blank_condition(bucket, wanted), None)
    for real, made in ((inputs["text"], family.blank_text()), (inputs["given"], blank)):
        assert {key: tuple(tensor.shape[1:]) for key, tensor in real.items()} == {
            key: tuple(tensor.shape) for key, tensor in made.items()
        }


@pytest.mark.parametrize("name", TINY)
def test_defaults_fit_the_model(folders, name):
    row = TINY[name]
    family = row.open(folders[name])
    for method in ("lora", "full"):
        defaults = family.defaults(method)
        assert set(defaults) >= {"data.buckets", "data.conditions", "method.target_modules", "model.task"}
        assert set(defaults) >= {"objective.timestep_sampling", "objective.shift", "optimizer.lr"}
        assert defaults["model.task"] == row.task


@pytest.mark.parametrize("name", TINY)
def test_the_type_of_inputs_is_what_diffusers_says(folders, name):
    """And is found without looking through all modules, which takes milliseconds a pass."""
    family = TINY[name].open(folders[name])
    for dtype in (torch.bfloat16, torch.float32):
        for transformer in family.load_transformers(dtype).values():
            assert dtype_of(transformer) == transformer.dtype
