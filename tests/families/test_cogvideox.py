"""What CogVideoX has to itself: paired latent frames, a noised first frame, a table of positions, a schedule."""

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from finetrainers.config.schema import ModelConfig, RopeTemporal
from finetrainers.errors import UserError
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.families.cogvideox_positions import resize_table, rotary_positions
from finetrainers.families.find import find_family
from finetrainers.types import Bucket, Condition
from tests.families.cogvideox_models import CHANNELS, ROWS, TEXT_TOKENS
from tests.families.parity import CPU, compare_calls, random_clip, rates

FIRST, NONE = Condition(1), Condition()
I2V = [name for name in ROWS if name.endswith("i2v")]
TABLE = "cogvideox-5b-i2v"
ONE_STEP = SamplingOptions(1, 1.0, 8.0, seed=0)


same = partial(torch.testing.assert_close, rtol=1e-5, atol=3e-5)
"""Two copies of the same weights differ in the last bits: CPU kernels round by memory alignment."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: row.write(tmp_path_factory.mktemp(name)) for name, row in ROWS.items()}


def inputs(family: Family, size: str, *, seed: int = 0, batch: int = 1) -> dict[str, Any]:
    """Everything that `predict` takes besides a transformer, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    shape = family.latent_shape(Bucket.parse(size))
    given = {}
    if family.task == "image-to-video":
        given["image_latents"] = torch.randn(batch, CHANNELS, 1, *shape[1:], generator=generator)
    return {
        "latents_BCFHW": torch.randn(batch, CHANNELS, *shape, generator=generator),
        "timestep_B": torch.tensor([321.0, 999.0][:batch]),
        "text": {"prompt_embeds": torch.randn(batch, TEXT_TOKENS, 32, generator=generator)},
        "given": given,
        "fps_B": rates(*[8.0] * batch),
    }


# The published models. Configs of 2B and 5B were written before 1.5 was known, and lack its options.

SIZE_1_0 = {"sample_width": 90, "sample_height": 60, "sample_frames": 49}
SIZE_1_5 = {"sample_width": 300, "sample_height": 300, "sample_frames": 81}
COMMON = {
    "attention_head_dim": 64, "out_channels": 16, "patch_size": 2, "temporal_compression_ratio": 4,
    "max_text_seq_length": 226, "text_embed_dim": 4096, "time_embed_dim": 512,
}  # fmt: skip
ROTARY_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
PAIRS = {**SIZE_1_5, "patch_size_t": 2, "patch_bias": False}
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "2b": ({"num_attention_heads": 30, "num_layers": 30, "in_channels": 16, **SIZE_1_0}, 1.694),
    "5b": ({**ROTARY_5B, "in_channels": 16, **SIZE_1_0}, 5.570),
    "5b-i2v": ({**ROTARY_5B, "in_channels": 32, "use_learned_positional_embeddings": True, **SIZE_1_0}, 5.570),
    "1.5": ({**ROTARY_5B, "in_channels": 16, **PAIRS}, 5.571),
    "1.5-i2v": ({**ROTARY_5B, "in_channels": 32, **PAIRS, "ofs_embed_dim": 512}, 5.572),
}


def published(name: str, folder: Path, **options: Any) -> Family:
    """The family on the configs of a published model, without its weights."""
    i2v = name.endswith("i2v")
    index = {"_class_name": "CogVideoXImageToVideoPipeline" if i2v else "CogVideoXPipeline"}
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps({**COMMON, **PUBLISHED[name][0]}))
    (folder / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.7}))
    return find_family(ModelConfig(path=str(folder), **options))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_built_as_they_are(name, tmp_path):
    family = published(name, tmp_path)
    with torch.device("meta"):
        transformer = family.build_transformers()["transformer"]
    billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert round(billions, 3) == PUBLISHED[name][1]
    defaults = family.defaults("lora")
    assert all(family.check_bucket(Bucket.parse(size)) is None for size in defaults["data.buckets"])
    targets = defaults["method.target_modules"]
    found = [path for path, _ in transformer.named_modules() if re.fullmatch(targets, path)]
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    blocks = range(len(transformer.transformer_blocks))
    assert found == [f"transformer_blocks.{block}.attn1.{name}" for block in blocks for name in projections]


VARIANTS = [
    ("2b", "text-to-video", 8.0, "49x480x720", (13, 60, 90), 17550),
    ("5b", "text-to-video", 8.0, "49x480x720", (13, 60, 90), 17550),
    ("5b-i2v", "image-to-video", 8.0, "49x480x720", (13, 60, 90), 17550),
    ("1.5", "text-to-video", 16.0, "81x768x1360", (22, 96, 170), 11 * 48 * 85),
    ("1.5-i2v", "image-to-video", 16.0, "81x768x1360", (22, 96, 170), 11 * 48 * 85),
]


@pytest.mark.parametrize(("name", "task", "fps", "native", "latents", "tokens"), VARIANTS)
def test_a_variant_is_told_by_its_configs(name, task, fps, native, latents, tokens, tmp_path):
    family, other = published(name, tmp_path), {"text-to-video": "image-to-video", "image-to-video": "text-to-video"}
    assert (family.supported_tasks, family.task, family.default_fps) == ((task,), task, fps)
    assert family.defaults("lora")["data.buckets"] == [native]
    assert family.defaults("lora")["data.conditions"] == ({"first": 0.95} if task == "image-to-video" else {})
    assert (family.latent_shape(Bucket.parse(native)), family.num_tokens(Bucket.parse(native))) == (latents, tokens)
    assert family.blank_text()["prompt_embeds"].shape == (226, 4096)
    with pytest.raises(UserError, match=f"'{other[task]}' is not supported by .* it does: {task}"):
        published(name, tmp_path, task=other[task])


SIZES = [
    ("2b", "49x480x720", None),
    ("2b", "9x1024x64", None),
    ("2b", "48x480x720", "49x480x720"),
    ("5b", "1x16x16", None),
    ("5b", "12x480x720", "9x480x720"),
    ("5b", "49x488x725", "49x480x720"),
    ("1.5", "81x2400x2400", None),
    ("1.5", "85x768x1360", "81x768x1360"),
    ("1.5", "81x2416x1360", "81x2400x1360"),
    ("1.5-i2v", "17x768x4000", "17x768x2400"),
    ("1.5-i2v", "17x2399x4000", "17x2400x4000"),
]


@pytest.mark.parametrize(("name", "size", "nearest"), SIZES)
def test_sizes_that_a_model_cannot_take_are_refused_with_the_nearest(name, size, nearest, tmp_path):
    family = published(name, tmp_path)
    reason = family.check_bucket(Bucket.parse(size))
    assert (reason is None) == (nearest is None)
    assert nearest is None or reason.endswith(f"the nearest is {nearest}")


def test_a_table_that_is_kept_fits_one_size(tmp_path):
    for options in ({}, {"learned_positions": "keep"}):
        family = published("5b-i2v", tmp_path, **options)
        assert family.check_bucket(Bucket(49, 480, 720)) is None
        # Fewer frames above all: there diffusers would take sines and cosines for the table without a word.
        for other in (Bucket(25, 480, 720), Bucket(49, 480, 704), Bucket(49, 481, 720)):
            reason = family.check_bucket(other)
            assert "49x480x720 alone" in reason and "resize" in reason and "remove" in reason
    for mode in ("resize", "remove"):
        family = published("5b-i2v", tmp_path, learned_positions=mode)
        assert family.check_bucket(Bucket(25, 480, 704)) is None
        assert family.check_bucket(Bucket(25, 480, 700)).endswith("the nearest is 25x480x704")


ROPE = {"method": "riflex", "frames": 97}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("2b", {"rope_temporal": ROPE}, "rope_temporal is for models with rotary positions"),
        ("2b", {"learned_positions": "keep"}, "no learned positions: leave it out"),
        ("1.5-i2v", {"learned_positions": "resize"}, "no learned positions: leave it out"),
        ("5b", {"embedded_guidance": 1.0}, "embedded_guidance is no option of cogvideox"),
    ],
)
def test_options_of_other_variants_are_refused(name, options, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        published(name, tmp_path, **options)


@pytest.mark.parametrize(("name", "shift"), [("cogvideox-2b", 3.0), ("cogvideox-5b", 1.0)])
def test_signal_kept_is_that_of_the_published_schedule(name, shift, folders):
    family = ROWS[name].open(folders[name])
    alphas = family.alphas_cumprod()
    roots, kept = [], 1.0
    for t in range(1000):
        kept *= 1 - (math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        roots.append(math.sqrt(kept / (shift + (1 - shift) * kept)))
    expected = [((root - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for root in roots]
    assert alphas.dtype == torch.float64
    assert alphas[-1] == 0.0
    torch.testing.assert_close(alphas, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_the_transformer_is_called_in_its_own_type(name, folders):
    family = ROWS[name].open(folders[name])
    transformer = family.load_transformers(torch.bfloat16)["transformer"]
    calls: list[dict[str, Any]] = []
    transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        answer = family.predict({"transformer": transformer}, **inputs(family, "9x64x96", batch=2))
    call = calls[0]
    assert answer.dtype == torch.float32 and answer.isfinite().all()
    assert call["hidden_states"].dtype == call["encoder_hidden_states"].dtype == torch.bfloat16
    assert call["timestep"].tolist() == [321, 999] and call["timestep"].dtype == torch.int64
    if name != "cogvideox-2b":
        assert {table.dtype for table in call["image_rotary_emb"]} == {torch.float32}
    ofs = call.get("ofs")
    assert (ofs is not None) == (name == "cogvideox-1.5-i2v")
    assert ofs is None or (ofs.tolist() == [2.0] and ofs.dtype == torch.bfloat16)


def test_rotary_positions_are_computed_once_a_size(folders):
    family = ROWS["cogvideox-5b"].open(folders["cogvideox-5b"])
    transformers = family.load_transformers(torch.float32)
    calls: list[dict[str, Any]] = []
    transformers["transformer"].register_forward_pre_hook(lambda m, a, kwargs: calls.append(kwargs), with_kwargs=True)
    for size in ("17x64x96", "9x96x64", "17x64x96"):
        family.predict(transformers, **inputs(family, size))
    first, second, third = (call["image_rotary_emb"][0] for call in calls)
    assert first is third and first is not second


@pytest.mark.parametrize(("size", "num_frames"), [("17x32x48", 5), ("9x32x48", 3), ("1x32x48", 1)])
def test_latent_frames_are_paired_by_repeating_the_first(size, num_frames, folders):
    clip, moments = random_clip(Bucket.parse(size)), {}
    for name in ("cogvideox-5b", "cogvideox-1.5"):
        family = ROWS[name].open(folders[name])
        moments[name] = family.encode_video(family.load_video_encoders(CPU, torch.float32), clip)
    for moment in ("mean", "logvar"):
        single, paired = (moments[name][moment] for name in ("cogvideox-5b", "cogvideox-1.5"))
        assert (single.shape[1], paired.shape[1]) == (num_frames, num_frames + 1)
        # In front: the pipeline drops what it has too many there.
        same(paired, torch.cat([single[:, :1], single], dim=1))


class Camera:
    """Stands for a VAE: notes the pixels that it is given, and answers with a known posterior."""

    device, dtype = CPU, torch.float32

    def __init__(self, *, inverted: bool) -> None:
        self.config = SimpleNamespace(scaling_factor=0.5, invert_scale_latents=inverted)

    def encode(self, pixels_NCFHW: torch.Tensor) -> Any:
        self.pixels_NCFHW = pixels_NCFHW
        mean = pixels_NCFHW.mean((1, 3, 4), keepdim=True).expand(-1, CHANNELS, -1, 2, 3)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -4.0)))


def test_the_first_frame_is_noised_by_a_log_normal(folders):
    family, clip = ROWS[TABLE].open(folders[TABLE]), random_clip(Bucket(17, 64, 96))
    strengths = []
    for seed in range(150):
        camera = Camera(inverted=False)
        family.encode_condition({"vae": camera}, clip, FIRST, torch.Generator().manual_seed(seed))
        images = camera.pixels_NCFHW
        assert images.shape == (5, 3, 1, 64, 96)
        torch.testing.assert_close(images[0, :, 0], clip[0].float() / 127.5 - 1)
        noise = (images[1:] - images[:1]).flatten(1)
        assert (noise.mean(1).abs() < 5 * noise.std(1) / noise.shape[1] ** 0.5).all()
        strengths += noise.std(1).log().tolist()
    drawn = torch.tensor(strengths)
    # 600 draws of N(-3, 0.5): bounds of four standard errors.
    assert abs(drawn.mean() + 3.0) < 4 * 0.5 / 600**0.5
    assert abs(drawn.std() - 0.5) < 4 * 0.5 / 1200**0.5


@pytest.mark.parametrize(("inverted", "scale"), [(False, 0.5), (True, 2.0)])
def test_what_is_given_of_the_first_frame(inverted, scale, folders):
    family, bucket = ROWS[TABLE].open(folders[TABLE]), Bucket(17, 16, 24)

    def encode(seed: int) -> dict[str, torch.Tensor]:
        vae, generator = Camera(inverted=inverted), torch.Generator().manual_seed(seed)
        return family.encode_condition({"vae": vae}, random_clip(bucket), FIRST, generator)

    encoded, latents = encode(0), torch.randn(CHANNELS, 5, 2, 3)
    assert all(torch.equal(tensor, encoded[name]) for name, tensor in encode(0).items())
    assert not torch.equal(encode(1)["mean"][1:], encoded["mean"][1:])
    blank = family.blank_condition(bucket, FIRST)
    assert {name: tensor.shape for name, tensor in blank.items()} == {name: t.shape for name, t in encoded.items()}

    clean = family.given(FIRST, latents, encoded, None)["image_latents"]
    torch.testing.assert_close(clean, encoded["mean"][0] * scale)
    deviations, nearest = [], set()
    for seed in range(40):
        drawn = family.given(FIRST, latents, encoded, torch.Generator().manual_seed(seed))["image_latents"]
        away = (drawn / scale - encoded["mean"]).flatten(1)
        nearest.add(int(away.square().mean(1).argmin()))
        deviations.append(away.square().mean(1).min().sqrt())
    # A draw from the posterior (deviation exp(-4 / 2)) of any of the noised frames.
    assert abs(torch.stack(deviations).mean() - math.exp(-2)) < 0.02
    assert len(nearest) > 1
    dropped = family.given(NONE, latents, {}, torch.Generator())["image_latents"]
    assert dropped.shape == clean.shape and not dropped.any()
    assert family.needs_encoding(FIRST) and not family.needs_encoding(NONE)
    assert family.blank_condition(bucket, NONE) == {}


def test_only_the_noised_frames_are_drawn(folders):
    family, latents = ROWS[TABLE].open(folders[TABLE]), torch.zeros(CHANNELS, 5, 2, 3)
    blank = family.blank_condition(Bucket(17, 16, 24), FIRST)
    means = torch.arange(5.0).view(5, 1, 1, 1, 1).expand_as(blank["mean"])
    encoded = {**blank, "mean": means, "logvar": torch.full_like(means, -60.0)}
    generators = [torch.Generator().manual_seed(seed) for seed in range(60)]
    drawn = [family.given(FIRST, latents, encoded, generator)["image_latents"] for generator in generators]
    assert {round(image.mean().item()) for image in drawn} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ROWS)
def test_which_frames_can_be_given(name, folders):
    family, bucket = ROWS[name].open(folders[name]), Bucket(17, 64, 96)
    assert family.check_condition(NONE, bucket) is None
    for condition in (FIRST, Condition(1, 1), Condition(9)):
        reason = family.check_condition(condition, bucket)
        assert (reason is None) == (name in I2V and condition == FIRST), condition
    given = family.given(NONE, torch.zeros(CHANNELS, 5, 8, 12), {}, None)
    assert list(given) == (["image_latents"] if name in I2V else [])


def test_text_is_padded_and_never_masked(folders):
    family = ROWS["cogvideox-5b"].open(folders["cogvideox-5b"])
    tokens = family.tokenize(family.load_tokenizers(), ["a cat", "b" * 60])
    assert set(tokens) == {"input_ids"} and tokens["input_ids"].shape == (2, TEXT_TOKENS)
    encoders = family.load_text_encoders(CPU, torch.float32)
    embeds = family.embed(encoders, tokens)["prompt_embeds"]
    same(embeds, encoders["text_encoder"](input_ids=tokens["input_ids"]).last_hidden_state)
    layers = [path for path, _ in encoders["text_encoder"].named_modules()]
    trained = [path for path in layers if re.fullmatch(family.text_encoder_targets, path)]
    assert trained == [f"encoder.block.{block}.layer.0.SelfAttention.{name}" for block in (0, 1) for name in "qkvo"]
    counted = family.count_tokens(family.load_tokenizers(), ["b" * 60, "a\u00e9"])
    assert [(count.num_tokens, count.num_unknown, count.limit) for count in counted] == [(62, 0, 40), (4, 1, 40)]


@pytest.mark.parametrize("name", ROWS)
def test_a_video_is_always_asked_for_by_its_size(name, folders):
    family, asked = ROWS[name].open(folders[name]), {}
    scheduler = family.pipeline().scheduler

    class Pipeline:
        def __call__(self, **call: Any) -> Any:
            asked.update(call)
            return SimpleNamespace(frames=torch.zeros(1, 9, 3, 64, 96))

    pipeline = Pipeline()
    pipeline.scheduler = scheduler
    image = {"image": object()} if name in I2V else {}
    family.render(pipeline, Bucket(9, 64, 96), SamplingOptions(7, None, 8.0, seed=0), prompt="a", **image)
    assert [asked[key] for key in ("num_frames", "height", "width", "max_sequence_length")] == [9, 64, 96, TEXT_TOKENS]
    assert (asked["guidance_scale"], asked["num_inference_steps"]) == (6.0, 7)
    assert asked["use_dynamic_cfg"] == (type(scheduler) is diffusers.CogVideoXDPMScheduler) == (name != "cogvideox-2b")
    assert asked.get("image") is image.get("image")
    if name in I2V:
        with pytest.raises(UserError, match="from an image"):
            family.render(pipeline, Bucket(9, 64, 96), ONE_STEP, prompt="a")


# The learned table.


def answers(family: Family, transformer: Any, size: str) -> torch.Tensor:
    with torch.no_grad():
        return family.predict({"transformer": transformer}, **inputs(family, size))


def test_a_table_is_interpolated_along_each_axis():
    text, column = [7.0, 8.0], [0.0, 4.0]
    halfway = [0.0, 1.0, 3.0, 4.0]  # At -1/4, 1/4, 3/4 and 5/4 of the way from one entry to the next, clamped.
    table = torch.tensor(text + column).view(1, 4, 1)
    for axis in range(3):
        own, asked = [1, 1, 1], [1, 1, 1]
        own[axis], asked[axis] = 2, 4
        assert resize_table(table, 2, tuple(own), tuple(asked)).flatten().tolist() == text + halfway
    rows = torch.arange(24.0).view(1, 24, 1)
    doubled = resize_table(rows, 0, (2, 3, 4), (2, 6, 4)).view(2, 6, 4)
    assert torch.equal(doubled[1, :, 2], 12 + 2 + torch.tensor([0.0, 1.0, 3.0, 5.0, 7.0, 8.0]))


def test_a_resized_table_serves_every_size_and_stays_as_it_is(folders, tmp_path):
    family = ROWS[TABLE].open(folders[TABLE], learned_positions="resize")
    transformer = family.load_transformers(torch.float32)["transformer"]
    plain = diffusers.CogVideoXTransformer3DModel.from_pretrained(folders[TABLE], subfolder="transformer")
    assert transformer.state_dict().keys() == plain.state_dict().keys()
    same(answers(family, transformer, "17x64x96"), answers(family, plain, "17x64x96"))

    tokens: list[torch.Tensor] = []
    transformer.patch_embed.register_forward_hook(lambda module, args, output: tokens.append(output))
    table = plain.patch_embed.pos_embedding
    for size, grid in [("9x64x96", (3, 4, 6)), ("17x96x64", (5, 6, 4)), ("25x32x48", (7, 2, 3))]:
        answers(family, transformer, size)
        plain.patch_embed.use_learned_positional_embeddings = False
        given = inputs(family, size)
        frames = given["latents_BCFHW"].shape[2]
        images = torch.nn.functional.pad(given["given"]["image_latents"], (0, 0, 0, 0, 0, frames - 1))
        video = torch.cat([given["latents_BCFHW"], images], dim=1).transpose(1, 2)
        without = plain.patch_embed(given["text"]["prompt_embeds"], video)
        expected = resize_table(table, TEXT_TOKENS, (5, 4, 6), grid)
        same(tokens[-1] - without, expected)
    plain.patch_embed.use_learned_positional_embeddings = True
    assert torch.equal(transformer.patch_embed.pos_embedding, table)

    transformer.save_pretrained(tmp_path)
    reloaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert reloaded.config.use_learned_positional_embeddings
    same(answers(family, reloaded, "17x64x96"), answers(family, plain, "17x64x96"))


def test_a_removed_table_is_gone_from_the_saved_transformer(folders, tmp_path):
    family = ROWS[TABLE].open(folders[TABLE], learned_positions="remove")
    transformer = family.load_transformers(torch.float32)["transformer"]
    assert "patch_embed.pos_embedding" not in transformer.state_dict()
    plain = diffusers.CogVideoXTransformer3DModel.from_pretrained(folders[TABLE], subfolder="transformer")
    plain.patch_embed.pos_embedding.zero_()
    same(answers(family, transformer, "17x64x96"), answers(family, plain, "17x64x96"))
    transformer.save_pretrained(tmp_path)
    reloaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert not hasattr(reloaded.patch_embed, "pos_embedding")
    for size in ("17x64x96", "9x96x64"):
        same(answers(family, reloaded, size), answers(family, transformer, size))


@pytest.mark.parametrize("mode", ["keep", "resize", "remove"])
def test_samples_come_from_the_table_that_is_trained(mode, folders):
    family = ROWS[TABLE].open(folders[TABLE], learned_positions=mode)
    trained = family.load_transformers(torch.float32)["transformer"]
    loaded = family.load_pipeline(torch.float32).transformer
    with torch.device("meta"):
        built = family.build_transformers()["transformer"]
    assert trained.state_dict().keys() == loaded.state_dict().keys() == built.state_dict().keys()
    for size in ("17x64x96",) if mode == "keep" else ("17x64x96", "9x64x96", "9x96x64"):
        same(answers(family, loaded, size), answers(family, trained, size))
    assert family.notes() == ({} if mode == "keep" else {"learned_positions": mode})


# Positions in time beyond the trained length.


@pytest.mark.parametrize("name", ["5b", "1.5"])
@pytest.mark.parametrize("shape", [(13, 60, 90), (3, 128, 8), (6, 40, 64), (1, 2, 300)])
def test_rotary_positions_are_the_pipelines(name, shape):
    config = {**COMMON, **PUBLISHED[name][0]}
    transformer = SimpleNamespace(config=SimpleNamespace(**{"patch_size_t": None, **config}))
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)
    frames, height, width = shape
    theirs = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, 8 * height, 8 * width, frames, CPU
    )
    ours = rotary_positions(shape, CPU, config=config, rope_temporal=None)
    assert all(torch.equal(mine, their) for mine, their in zip(ours, theirs, strict=True))


def angles_by_hand(method: str, trained: int, wanted: int, num_positions: int) -> list[list[float]]:
    """Of the 8 frequencies of the time axis of the published models, whose heads are 64 wide."""
    base, squeezed = 10_000.0, 1.0
    if method == "ntk":
        base *= (wanted / trained) ** (16 / 14)
    if method == "interpolate":
        squeezed = trained / wanted
    frequencies = [base ** (-k / 8) for k in range(8)]
    if method == "riflex":
        # The second turns in 19.9 positions: it is the first to take longer than the 13 (11) that were trained.
        frequencies[1] = 0.9 * 2 * math.pi / wanted
    return [[position * squeezed * frequency for frequency in frequencies] for position in range(num_positions)]


@pytest.mark.parametrize("method", ["interpolate", "ntk", "riflex"])
@pytest.mark.parametrize(("name", "frames", "trained", "wanted"), [("5b", 97, 13, 25), ("1.5", 161, 11, 21)])
def test_positions_in_time_reach_beyond_the_trained_length(method, name, frames, trained, wanted):
    config = {**COMMON, **PUBLISHED[name][0]}
    shape = (25, 12, 20)
    plain = rotary_positions(shape, CPU, config=config, rope_temporal=None)
    rope = RopeTemporal(method=method, frames=frames)
    reaching = rotary_positions(shape, CPU, config=config, rope_temporal=rope)
    num_positions = 25 if name == "5b" else 13
    angles = torch.tensor(angles_by_hand(method, trained, wanted, num_positions), dtype=torch.float64)
    for of, table, before in zip((torch.cos, torch.sin), reaching, plain, strict=True):
        assert table.dtype == torch.float32 and table.shape == before.shape
        assert torch.equal(table[:, 16:], before[:, 16:])
        time = table.view(num_positions, 6 * 10, 64)[:, :, :16]
        expected = of(angles).float().repeat_interleave(2, dim=1)[:, None].expand_as(time)
        torch.testing.assert_close(time, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(time, before.view(num_positions, 60, 64)[:, :, :16], atol=0.1)


@pytest.mark.parametrize("method", ["interpolate", "ntk", "riflex"])
@pytest.mark.parametrize("name", ["cogvideox-5b", "cogvideox-1.5-i2v"])
def test_samples_reach_as_far_as_training(name, method, folders):
    rope = {"method": method, "frames": 33}
    row = dataclasses.replace(ROWS[name], bucket="33x32x48", options={"rope_temporal": rope})
    compare_calls(row, folders[name], Condition.parse(row.conditions[0]), fps=8.0, prompt="a cat")
    family, shape = row.open(folders[name]), (10, 4, 6)
    pipeline = family.pipeline(**family.load_transformers(torch.float32))
    config = family.config("transformer")
    expected = rotary_positions(shape, CPU, config=config, rope_temporal=RopeTemporal(**rope))
    plain = rotary_positions(shape, CPU, config=config, rope_temporal=None)
    asked = pipeline._prepare_rotary_positional_embeddings(32, 48, 10, CPU)
    assert torch.equal(asked[0], expected[0]) and not torch.equal(asked[0], plain[0])
    assert (type(pipeline).__name__, family.notes()) == (row.pipeline, {"rope_temporal": rope})
