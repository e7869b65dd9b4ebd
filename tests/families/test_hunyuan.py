"""HunyuanVideo: what its folders say, how text and image reach the transformer, and the time axis."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetrainers.errors import UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Family, SamplingOptions
from finetrainers.types import Bucket, Condition
from tests.families.hunyuan_models import LATENT_CHANNELS, ROWS, write_tiny_hunyuan
from tests.families.parity import rates

CPU = torch.device("cpu")
FIRST = Condition(1)
IMAGE_ROWS = ["hunyuan-i2v", "hunyuan-i2v-33ch"]
# As published: transformer/config.json of hunyuanvideo-community/HunyuanVideo, -I2V and -I2V-33ch.
FULL = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": [16, 56, 56],
}
FULL_SIZES = {
    "hunyuan": FULL,
    "hunyuan-i2v": FULL | {"image_condition_type": "token_replace"},
    "hunyuan-i2v-33ch": FULL | {"image_condition_type": "latent_concat", "in_channels": 33, "guidance_embeds": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hunyuan")
    return {name: row.write(root / name) for name, row in ROWS.items()}


def copied(folder: Path, target: Path, part: str, **changes: object) -> Path:
    """A copy of a folder with another config of one part."""
    shutil.copytree(folder, target)
    path = next(target.glob(f"{part}/*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip(num_frames: int = 9, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8, generator=generator)


def embedded(family: Family, captions: list[str], images: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    if family.text_sees_image and images is None:
        images = [clip(1)[0]] * len(captions)
    tokens = family.tokenize(family.load_tokenizers(), captions, images)
    with torch.no_grad():
        return family.embed(family.load_text_encoders(CPU, torch.float32), tokens)


class Recorder(torch.nn.Module):
    dtype = torch.float32

    def forward(self, hidden_states, **call):
        self.call = call | {"hidden_states": hidden_states}
        return (hidden_states[:, :LATENT_CHANNELS],)


# The model at its full size.


@pytest.mark.parametrize("row", ROWS)
def test_the_full_size_has_the_published_parameters_and_targets_only_the_blocks(folders, row, tmp_path):
    folder = copied(folders[row], tmp_path / "full", "transformer", **FULL_SIZES[row])
    family = ROWS[row].open(folder)
    with torch.device("meta"):
        transformer = family.build_transformers()["transformer"]
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count / 1e9 == pytest.approx(12.821 if FULL_SIZES[row]["guidance_embeds"] else 12.811, abs=5e-4)
    pattern = re.compile(family.defaults("lora")["method.target_modules"])
    found = {name: module for name, module in transformer.named_modules() if pattern.fullmatch(name)}
    # Two streams of three projections and an output in 20 blocks, one of three projections in 40.
    assert len(found) == 20 * 8 + 40 * 3
    assert all(isinstance(module, torch.nn.Linear) for module in found.values())
    assert {name.split(".")[0] for name in found} == {"transformer_blocks", "single_transformer_blocks"}
    refiner = "context_embedder.token_refiner.refiner_blocks.0.attn.to_q"
    assert refiner in dict(transformer.named_modules()) and not pattern.fullmatch(refiner)


@pytest.mark.parametrize("row", ROWS)
def test_what_a_folder_does_is_read_from_its_config(folders, row, tmp_path):
    family = ROWS[row].open(folders[row])
    is_image, told = row != "hunyuan", row != "hunyuan-i2v-33ch"
    assert family.supported_tasks == ((IMAGE_TO_VIDEO,) if is_image else (TEXT_TO_VIDEO,))
    assert ("image_processor" in family.parts["text_encoder"]) == is_image == family.text_sees_image
    assert family.latent_channels == LATENT_CHANNELS
    defaults = family.defaults("lora")
    assert defaults["data.conditions"] == ({"first": 1.0} if is_image else {})
    assert defaults["validation.guidance_scale"] == (6.0 if told else 1.0)
    assert ("model.embedded_guidance" in defaults) == told
    assert all(family.check_bucket(Bucket.parse(size)) is None for size in defaults["data.buckets"])
    assert (defaults["optimizer.lr"], family.defaults("full")["optimizer.lr"]) == (1e-4, 1e-5)
    other = TEXT_TO_VIDEO if is_image else IMAGE_TO_VIDEO
    with pytest.raises(UserError, match=rf"{other}.* is not supported .*; it does: {family.task}"):
        replace(ROWS[row], task=other).open(folders[row])
    shifted = copied(folders[row], tmp_path / "shifted", "scheduler", shift=5.0)
    assert defaults["objective.shift"] == 7.0
    assert ROWS[row].open(shifted).defaults("lora")["objective.shift"] == 5.0


BUCKETS = [
    ("49x544x960", None),
    ("129x720x1280", None),
    ("1x16x16", None),
    ("48x544x960", "49x544x960"),
    ("49x540x960", "49x544x960"),
    ("4x8x40", "5x16x32"),
    ("2x500x500", "1x496x496"),
]


@pytest.mark.parametrize(("size", "nearest"), BUCKETS)
def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest(folders, size, nearest):
    family = ROWS["hunyuan"].open(folders["hunyuan"])
    reason = family.check_bucket(Bucket.parse(size))
    assert (reason is None) == (nearest is None)
    if nearest:
        assert reason and "4k+1" in reason and "multiples of 16" in reason and reason.endswith(nearest)
        assert family.check_bucket(Bucket.parse(nearest)) is None


def test_tokens_are_counted_as_the_transformer_cuts_them(folders):
    family = ROWS["hunyuan"].open(folders["hunyuan"])
    assert family.num_tokens(Bucket.parse("61x544x960")) == 16 * 34 * 60


# Guidance.


@pytest.mark.parametrize(("scale", "told"), [(None, 1000.0), (6.0, 6000.0), (0.0, 0.0)])
@pytest.mark.parametrize("row", ["hunyuan", "hunyuan-i2v"])
def test_training_tells_the_model_a_thousand_times_the_scale(folders, row, scale, told):
    family, recorder = ROWS[row].open(folders[row], embedded_guidance=scale), Recorder()
    text = {name: tensor.expand(2, *tensor.shape) for name, tensor in family.blank_text().items()}
    family.predict(
        {"transformer": recorder},
        noise(2, 4, 3, 4, 6),
        torch.tensor([1.0, 2.0]),
        text=text,
        given={},
        fps_B=rates(8.0, 24.0),
    )
    assert recorder.call["guidance"].tolist() == [told, told]


def test_a_model_without_guidance_is_told_none_and_refuses_the_option(folders):
    row, folder = ROWS["hunyuan-i2v-33ch"], folders["hunyuan-i2v-33ch"]
    with pytest.raises(UserError, match=r"model\.embedded_guidance: .* no guidance scale; leave it out"):
        row.open(folder, embedded_guidance=1.0)
    family, recorder = row.open(folder), Recorder()
    text = {name: tensor[None] for name, tensor in family.blank_text().items()}
    family.predict(
        {"transformer": recorder}, noise(1, 4, 3, 4, 6), torch.ones(1), text=text, given={}, fps_B=rates(24.0)
    )
    assert recorder.call["guidance"] is None


@pytest.mark.parametrize(("row", "scale", "told", "num_forwards"), [
    ("hunyuan", None, 6000.0, 1),
    ("hunyuan-i2v", 3.0, 3000.0, 1),
    ("hunyuan-i2v-33ch", None, None, 1),
    ("hunyuan-i2v-33ch", 2.0, None, 2),
])  # fmt: skip
def test_samples_are_guided_in_the_models_own_way(folders, row, scale, told, num_forwards):
    family = ROWS[row].open(folders[row])
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    given = {"image": Image.fromarray(clip(1)[0].permute(1, 2, 0).numpy())} if family.text_sees_image else {}
    options = SamplingOptions(num_inference_steps=1, guidance_scale=scale, fps=24.0, seed=0)
    text, negative = embedded(family, ["a red circle"]), embedded(family, ["blurred"])
    frames = family.render(pipeline, Bucket(9, 32, 48), options, **given, **family.prompt_arguments(text, negative))
    assert len(calls) == num_forwards
    assert [None if call["guidance"] is None else call["guidance"].item() for call in calls] == [told] * num_forwards
    # The pipeline of latent_concat leaves out what the first two latents became.
    assert frames.shape == (5 if row == "hunyuan-i2v-33ch" else 9, 32, 48, 3)


# Given frames.

CONDITIONS = [
    ("hunyuan", "none", "9x32x48", None),
    ("hunyuan", "first", "9x32x48", "given no frames"),
    ("hunyuan-i2v", "first", "5x32x48", None),
    ("hunyuan-i2v-33ch", "first", "5x32x48", None),
    ("hunyuan-i2v", "none", "9x32x48", "always given the first frame"),
    ("hunyuan-i2v", "first_last", "9x32x48", "not `first_last`"),
    ("hunyuan-i2v-33ch", "prefix-5", "9x32x48", "not `prefix-5`"),
    ("hunyuan-i2v", "first", "1x32x48", "nothing left to learn"),
]


@pytest.mark.parametrize(("row", "condition", "size", "reason"), CONDITIONS)
def test_only_what_the_model_can_be_given_is_taken(folders, row, condition, size, reason):
    found = ROWS[row].open(folders[row]).check_condition(Condition.parse(condition), Bucket.parse(size))
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize("row", IMAGE_ROWS)
def test_the_given_image_is_encoded_by_itself(folders, row):
    family, video = ROWS[row].open(folders[row]), clip()
    encoders = family.load_video_encoders(CPU, torch.float32)
    assert family.needs_encoding(FIRST)
    encoded = family.encode_condition(encoders, video, FIRST, torch.Generator())
    vae = encoders["vae"]
    pixels = video[:1].permute(1, 0, 2, 3)[None].float() / 127.5 - 1
    with torch.no_grad():
        alone = vae.encode(pixels).latent_dist.mean[0] * 0.476986
    torch.testing.assert_close(encoded["image"], alone)
    of_clip = family.encode_video(encoders, video)["mean"][:, :1] * 0.476986
    assert not torch.allclose(encoded["image"], of_clip, atol=0.01), "the first latent of a clip has seen later frames"
    blank = family.blank_condition(Bucket(9, 32, 48), FIRST)
    assert {name: tensor.shape for name, tensor in blank.items()} == {"image": encoded["image"].shape}


def predicted_from(family: Family, latents_BCFHW: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    recorder = Recorder()
    text = {name: tensor[None] for name, tensor in family.blank_text().items()}
    family.predict({"transformer": recorder}, latents_BCFHW, torch.ones(1), text=text, given=given, fps_B=rates(24.0))
    states: torch.Tensor = recorder.call["hidden_states"]
    return states


def test_token_replace_puts_the_image_in_place_of_the_first_latents(folders):
    family = ROWS["hunyuan-i2v"].open(folders["hunyuan-i2v"])
    image, noised = noise(4, 1, 4, 6, seed=1), noise(1, 4, 3, 4, 6, seed=2)
    given = family.given(FIRST, noise(4, 3, 4, 6), {"image": image}, None)
    assert given["frames"].tolist() == [True, False, False]
    states = predicted_from(family, noised, {name: tensor[None] for name, tensor in given.items()})
    assert torch.equal(states, torch.cat([image[None], noised[:, :, 1:]], dim=2))


def test_latent_concat_puts_the_image_and_its_mask_beside_the_noised_latents(folders):
    family = ROWS["hunyuan-i2v-33ch"].open(folders["hunyuan-i2v-33ch"])
    image, noised = noise(4, 1, 4, 6, seed=1), noise(1, 4, 3, 4, 6, seed=2)
    given = family.given(FIRST, noise(4, 3, 4, 6), {"image": image}, None)
    assert "frames" not in given, "the first frame is noised and learned as well"
    states = predicted_from(family, noised, {name: tensor[None] for name, tensor in given.items()})
    assert states.shape == (1, 9, 3, 4, 6)
    assert torch.equal(states[:, :4], noised)
    assert torch.equal(states[0, 4:8, :1], image) and torch.equal(states[0, 8, 0], torch.ones(4, 6))
    assert not states[:, 4:, 1:].any()


# Text.


@pytest.mark.parametrize("length", [0, 1, 60, 250, 251, 252, 253, 255, 256, 257, 400])
@pytest.mark.parametrize("row", ROWS)
def test_captions_of_any_length_are_read_as_the_pipeline_reads_them(folders, row, length):
    family = ROWS[row].open(folders[row])
    pipeline = family.load_pipeline(torch.float32)
    picture, other = clip(1, 40, 72, seed=1)[0], clip(1, 40, 72, seed=2)[0]
    # Each x is a token; beside it stands another length, which the pipeline cannot batch with it once one is cut.
    text = embedded(family, ["x" * length, "a blue square"], [picture, other])
    given = {}
    if family.text_sees_image:
        given["image"] = Image.fromarray(picture.permute(1, 2, 0).numpy())
        # As the pipeline chooses it in its call.
        given["image_embed_interleave"] = 4 if row == "hunyuan-i2v" else 2
    with torch.no_grad():
        embeds, pooled, mask = pipeline.encode_prompt(prompt="x" * length, **given)
    torch.testing.assert_close(text["prompt_embeds"][:1], embeds, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(text["pooled_prompt_embeds"][:1], pooled)
    assert torch.equal(text["prompt_attention_mask"][:1], mask.bool())
    assert {name: tensor.shape[1:] for name, tensor in text.items()} == {
        name: tensor.shape for name, tensor in family.blank_text().items()
    }


@pytest.mark.parametrize(("row", "length"), [("hunyuan", 256), ("hunyuan-i2v", 144 + 252), ("hunyuan-i2v-33ch", 540)])
def test_captions_and_images_make_a_difference(folders, row, length):
    family = ROWS[row].open(folders[row])
    text = embedded(family, ["a red circle", "a red square"])["prompt_embeds"]
    assert text.shape[1] == length
    assert (text[0] - text[1]).abs().max() > 0.1
    if family.text_sees_image:
        seen = embedded(family, ["a cat", "a cat"], [clip(1, seed=1)[0], clip(1, seed=2)[0]])["prompt_embeds"]
        assert (seen[0] - seen[1]).abs().max() > 0.01


@pytest.mark.parametrize(("row", "limit"), [("hunyuan", 256), ("hunyuan-i2v", 252)])
def test_the_captions_own_tokens_are_counted_up_to_what_is_read(folders, row, limit):
    family = ROWS[row].open(folders[row])
    tokenizers = family.load_tokenizers()
    counts = family.count_tokens(tokenizers, ["", "x" * 300, "the video"])
    # Words of the template are tokens; the others are read letter by letter.
    assert [count.num_tokens for count in counts] == [0, 300, 3 + 1]
    assert {count.limit for count in counts} == {limit} and not any(count.num_unknown for count in counts)
    captions = ["x" * (limit - 1), "x" * limit, "x" * (limit + 1)]
    images = [clip(1)[0]] * 3 if family.text_sees_image else None
    tokens = family.tokenize(tokenizers, captions, images)
    letter = tokenizers["tokenizer"].convert_tokens_to_ids("x")
    read = tokens["llama_input_ids"].gather(1, tokens["kept_positions"]) == letter
    assert read.sum(dim=1).tolist() == [limit - 1, limit, limit]


@pytest.mark.parametrize("row", ROWS)
def test_the_tokens_of_a_caption_can_be_kept_in_a_file(folders, row, tmp_path):
    family = ROWS[row].open(folders[row])
    images = [clip(1)[0]] * 2 if family.text_sees_image else None
    tokens = family.tokenize(family.load_tokenizers(), ["a cat", "a red circle"], images)
    second = {name: tensor[1] for name, tensor in tokens.items()}
    # Which refuses tensors that lie in one another's memory.
    save_file(second, tmp_path / "tokens.safetensors")
    kept = load_file(tmp_path / "tokens.safetensors")
    assert kept.keys() == second.keys() and all(torch.equal(kept[name], second[name]) for name in kept)


def test_both_kinds_of_image_to_video_keep_their_own_text_in_the_cache(folders):
    one, other = (ROWS[row].open(folders[row]) for row in IMAGE_ROWS)
    assert one.fingerprint("video_encoder") == other.fingerprint("video_encoder")
    assert one.fingerprint("text_encoder") != other.fingerprint("text_encoder")


@pytest.mark.parametrize("row", ROWS)
def test_the_published_name_of_the_tokenizer_does_not_change_what_it_reads(folders, row, tmp_path):
    folder = copied(folders[row], tmp_path / "published", "tokenizer", tokenizer_class="LlamaTokenizerFast")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "LlamaTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    family = ROWS[row].open(folder)
    for tokenizer in (family.load_tokenizers()["tokenizer"], family.load_pipeline(torch.float32).tokenizer):
        assert tokenizer("Describe the video by").input_ids == [0, *tokenizer.convert_tokens_to_ids(
            ["Describe", "Ġthe", "Ġvideo", "Ġby"]
        )]  # fmt: skip


def test_a_tokenizer_that_pads_on_the_left_is_refused(folders, tmp_path):
    folder = copied(folders["hunyuan"], tmp_path / "left", "tokenizer", padding_side="left")
    with pytest.raises(UserError, match=r"pads on the left.*padding_side to right in tokenizer/tokenizer_config\.json"):
        ROWS["hunyuan"].open(folder).load_tokenizers()


def test_a_caption_that_names_the_images_token_is_refused(folders):
    family = ROWS["hunyuan-i2v"].open(folders["hunyuan-i2v"])
    with pytest.raises(UserError, match=r"an image elsewhere.*'an <image> of it'"):
        family.tokenize(family.load_tokenizers(), ["a cat", "an <image> of it"], [clip(1)[0]] * 2)


@pytest.mark.parametrize("row", ROWS)
def test_adapters_of_the_text_encoder_lie_where_gradients_arise(folders, row):
    family = ROWS[row].open(folders[row])
    encoders = family.load_text_encoders(CPU, torch.float32)
    pattern = re.compile(family.text_encoder_targets)
    targets = {name: part for name, part in encoders["text_encoder"].named_modules() if pattern.fullmatch(name)}
    # Four projections in two of four layers; the last two layers are not read.
    assert len(targets) == 8 and not any("vision" in name for name in targets)
    encoders["text_encoder"].requires_grad_(True)
    images = [clip(1)[0]] if family.text_sees_image else None
    embeds = family.embed(encoders, family.tokenize(family.load_tokenizers(), ["a cat"], images))["prompt_embeds"]
    embeds.square().sum().backward()
    assert all(part.weight.grad is not None and part.weight.grad.any() for part in targets.values())
    language = getattr(encoders["text_encoder"], "model", encoders["text_encoder"])
    layers = getattr(language, "language_model", language).layers
    assert [layer.self_attn.q_proj.weight.grad is None for layer in layers] == [False, False, True, True]


# The time axis. The tiny model's frequencies are 256^(-2k/8) = 1, 1/4, 1/16 and 1/64; 129 frames are 33 latents.


def by_hand(method: str, num_frames: int, wanted: int) -> torch.Tensor:
    """Angles [F, 4] of the time axis."""
    frequencies = [1.0, 1 / 4, 1 / 16, 1 / 64]
    positions = torch.arange(num_frames, dtype=torch.float64)
    if method == "interpolate":
        positions = positions * 33 / wanted
    if method == "ntk":
        frequencies = [(256 * (wanted / 33) ** (8 / 6)) ** (-k / 4) for k in range(4)]
    if method == "riflex":
        # The periods are 6.3, 25.1, 100.5 and 402: the third is the first that is longer than 33.
        frequencies[2] = 0.9 * 2 * math.pi / wanted
    return torch.outer(positions, torch.tensor(frequencies, dtype=torch.float64))


@pytest.mark.parametrize("method", ["interpolate", "ntk", "riflex"])
@pytest.mark.parametrize("row", ROWS)
def test_the_time_axis_alone_is_stretched_in_training_and_sampling_alike(folders, row, method):
    plain = ROWS[row].open(folders[row])
    family = ROWS[row].open(folders[row], rope_temporal={"method": method, "frames": 417})
    latents = noise(1, 4, 5, 4, 6)
    theirs = plain.load_transformers(torch.float32)["transformer"]
    ours = family.load_transformers(torch.float32)["transformer"]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    tables = theirs.rope(latents)
    angles = by_hand(method, 5, wanted=105).float().repeat_interleave(2, dim=1).repeat_interleave(2 * 3, dim=0)
    stretched = angles.cos(), angles.sin()
    sampled = family.load_pipeline(torch.bfloat16).transformer
    for transformer in (ours, sampled, family.pipeline(transformer=ours).transformer, ours.to(torch.bfloat16)):
        for ours_SD, theirs_SD, expected in zip(transformer.rope(latents), tables, stretched, strict=True):
            assert ours_SD.dtype == torch.float32
            torch.testing.assert_close(ours_SD[:, :8], expected)
            assert torch.equal(ours_SD[:, 8:], theirs_SD[:, 8:]), "height and width"
    assert not torch.allclose(ours.rope(latents)[0], tables[0], atol=1e-3)


def test_stretched_positions_reach_the_prediction(folders):
    row, folder = ROWS["hunyuan"], folders["hunyuan"]
    answers = []
    for options in ({}, {"rope_temporal": {"method": "interpolate", "frames": 257}}):
        family = row.open(folder, **options)
        text = embedded(family, ["a cat"])
        with torch.no_grad():
            answers.append(
                family.predict(
                    family.load_transformers(torch.float32), noise(1, 4, 5, 4, 6), torch.tensor([500.0]),
                    text=text, given={}, fps_B=rates(24.0),
                )
            )  # fmt: skip
    assert not torch.allclose(answers[1], answers[0], atol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_a_prediction_reads_nothing_back_from_its_device(folders, row):
    """On the meta device there is nothing to read, so that waiting for a number fails."""
    family = ROWS[row].open(folders[row], rope_temporal={"method": "riflex", "frames": 417})
    with torch.device("meta"):
        transformers = family.build_transformers()
        latents = torch.zeros(2, 4, 3, 4, 6)
        encoded = family.blank_condition(Bucket(9, 32, 48), FIRST) if family.text_sees_image else {}
        sample = family.given(FIRST if encoded else Condition(), latents[0], encoded, None)
        given = {name: torch.stack([tensor, tensor]) for name, tensor in sample.items()}
        text = {name: torch.stack([tensor, tensor]) for name, tensor in family.blank_text().items()}
        answer = family.predict(transformers, latents, torch.zeros(2), text=text, given=given, fps_B=rates(8.0, 24.0))
    assert answer.shape == latents.shape and answer.is_meta


# The folder.


def test_tiling_reaches_the_vae_in_training_and_sampling(folders):
    from finetrainers.config.schema import ModelConfig
    from finetrainers.families.find import find_family

    family = find_family(ModelConfig(path=str(folders["hunyuan"])), vae_tiling=True)
    assert family.load_video_encoders(CPU, torch.float32)["vae"].use_tiling
    assert family.load_pipeline(torch.float32).vae.use_tiling
    assert not ROWS["hunyuan"].open(folders["hunyuan"]).load_pipeline(torch.float32).vae.use_tiling


def test_the_tiny_models_are_a_function_of_their_seed_alone(tmp_path):
    before = torch.random.get_rng_state()
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = write_tiny_hunyuan(tmp_path / name, seed=seed)
        weights.append((folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert torch.equal(before, torch.random.get_rng_state())
    assert weights[0] == weights[1] != weights[2]
