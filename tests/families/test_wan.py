"""What is Wan's own: which model a folder holds, its experts, its given frames, its text, and its positions in time."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from finetrainers.config.schema import ModelConfig, RopeTemporal
from finetrainers.errors import UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, SamplingOptions
from finetrainers.families.find import find_family
from finetrainers.families.wan import Wan
from finetrainers.families.wan_conditions import given_mask
from finetrainers.types import Bucket, Condition
from tests.families.parity import CPU, inputs_of, random_clip, rates, recorded
from tests.families.wan_models import IMAGE_TOKENS, write_tiny_wan

FIRST, FIRST_LAST, NONE = Condition(1), Condition(1, 1), Condition()
CLIP = random_clip(Bucket(9, 32, 48))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each variant's model, written when it is first asked for."""

    class Written(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = write_tiny_wan(tmp_path_factory.mktemp("models") / name, variant=name)
            return self[name]

    return Written()


def open_wan(folder: Path, **options: Any) -> Wan:
    family = find_family(ModelConfig(path=str(folder), **options))
    assert isinstance(family, Wan)
    return family


def changed(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a model with other values in one of its configs; None removes one."""
    shutil.copytree(folder, target, copy_function=os.symlink)
    config = json.loads((folder / file).read_text()) | changes
    (target / file).unlink()
    (target / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


# As published; sizes in 1e9 weights, to three digits.
_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_5B = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_PUBLISHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "2.1 1.3B": ("wan-2.1", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 1.419),
    "2.1 14B": ("wan-2.1", _14B, 14.288),
    "2.1 I2V": ("wan-2.1-i2v", {**_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 16.395),
    "2.2 A14B": ("wan-2.2-a14b", _14B, 2 * 14.288),
    "2.2 I2V-A14B": ("wan-2.2-a14b-i2v", {**_14B, "in_channels": 36}, 2 * 14.289),
    "2.2 5B": ("wan-2.2-5b", _5B, 5.000),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_sizes_and_the_layers_that_get_adapters(folders, tmp_path, name):
    variant, config, billions = _PUBLISHED[name]
    full_size = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "rope_max_seq_len": 1024, **config}
    folder = folders[variant]
    for part in [folder.name for folder in folders[variant].glob("transformer*")]:
        folder = changed(folder, tmp_path / part, f"{part}/config.json", **full_size)
    family = open_wan(folder)
    with torch.device("meta"):
        built = family.build_transformers()
    count = sum(parameter.numel() for model in built.values() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.0006 * len(built))
    targets = re.compile(family.defaults("lora")["method.target_modules"])
    attention = [f"attn{part}.to_{layer}" for part in (1, 2) for layer in ("q", "k", "v", "out.0")]
    # Without these diffusers would put zeros for them beside a LoRA that it loads.
    attention += ["attn2.add_k_proj", "attn2.add_v_proj"] if "image_dim" in config else []
    expected = {
        f"blocks.{block}.{layer}"
        for block in range(config["num_layers"])
        for layer in (*attention, "ffn.net.0.proj", "ffn.net.2")
    }
    for model in built.values():
        found = {path: module for path, module in model.named_modules() if targets.fullmatch(path)}
        assert found.keys() == expected
        assert all(isinstance(module, torch.nn.Linear) for module in found.values())


def test_the_text_encoders_layers_are_its_attention(folders):
    family = open_wan(folders["wan-2.1"])
    encoder = family.load_text_encoders(CPU, torch.float32)["text_encoder"]
    found = [path for path, _ in encoder.named_modules() if re.fullmatch(family.text_encoder_targets, path)]
    assert len(found) == 2 * 4


BUCKETS = [
    ("wan-2.1", "249x1024x1024", ""),
    ("wan-2.1", "13x16x48", ""),
    ("wan-2.1", "1x32x32", ""),
    ("wan-2.1", "12x32x32", "13x32x32"),
    ("wan-2.1", "8x40x70", "9x32x64"),
    ("wan-2.1", "2x8x8", "1x16x16"),
    ("wan-2.1", "257x32x32", "253x1024x1024"),
    ("wan-2.2-5b", "5x64x96", ""),
    ("wan-2.2-5b", "5x48x96", "5x64x96"),
    ("wan-2.2-5b", "1x16x16", "1x32x32"),
]


@pytest.mark.parametrize(("variant", "size", "said"), BUCKETS)
def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest(folders, variant, size, said):
    family = open_wan(folders[variant])
    reason = family.check_bucket(Bucket.parse(size))
    assert reason is None if not said else said in str(reason)
    assert family.check_bucket(Bucket.parse(said or size)) is None


def test_tokens_are_counted_in_patches(folders):
    assert open_wan(folders["wan-2.1"]).num_tokens(Bucket(9, 32, 48)) == 3 * 2 * 3
    assert open_wan(folders["wan-2.2-5b"]).num_tokens(Bucket(9, 64, 96)) == 3 * 2 * 3


# variant, task -> conditions, experts, size, fps, shift, law, guidance
FACTS: dict[tuple[str, str], tuple[dict[str, float], bool, str, float, float, str, float | None]] = {
    ("wan-2.1", TEXT_TO_VIDEO): ({}, False, "81x480x832", 16, 3, "logit_normal", 5),
    ("wan-2.1-i2v", IMAGE_TO_VIDEO): ({"first": 1}, False, "81x480x832", 16, 3, "logit_normal", 5),
    ("wan-2.1-flf2v", IMAGE_TO_VIDEO): ({"first_last": 1}, False, "81x480x832", 16, 16, "logit_normal", 5),
    ("wan-2.2-5b", TEXT_TO_VIDEO): ({}, False, "121x704x1280", 24, 5, "logit_normal", 5),
    ("wan-2.2-5b", IMAGE_TO_VIDEO): ({"first": 1}, False, "121x704x1280", 24, 5, "logit_normal", 5),
    ("wan-2.2-a14b", TEXT_TO_VIDEO): ({}, True, "81x480x832", 16, 12, "uniform", None),
    ("wan-2.2-a14b-i2v", IMAGE_TO_VIDEO): ({"first": 1}, True, "81x480x832", 16, 5, "uniform", 3.5),
}


@pytest.mark.parametrize(("variant", "task"), FACTS)
@pytest.mark.parametrize("unipc", [False, True])
def test_a_variant_is_told_by_its_configs(folders, tmp_path, variant, task, unipc):
    conditions, is_pair, bucket, fps, shift, law, guidance = FACTS[variant, task]
    folder = write_tiny_wan(tmp_path / "model", variant=variant, unipc=True) if unipc else folders[variant]
    family = open_wan(folder, task=task)
    defaults = family.defaults("lora")
    assert defaults["data.conditions"] == conditions and defaults["data.buckets"] == [bucket]
    assert defaults["objective.shift"] == shift and defaults["objective.timestep_sampling"] == law
    assert defaults["validation.guidance_scale"] == guidance and family.default_fps == fps
    assert defaults["model.experts"] == ("both" if is_pair else None)
    assert (defaults["optimizer.lr"], family.defaults("full")["optimizer.lr"]) == (1e-4, 1e-5)
    with torch.device("meta"):
        assert list(family.build_transformers()) == ["transformer", "transformer_2"][: 1 + is_pair]
    # A family opened without a task does what the model is for.
    assert open_wan(folder).task == next(known for name, known in FACTS if name == variant)


def test_configs_older_than_a_key_mean_its_default(folders, tmp_path):
    known = open_wan(folders["wan-2.1"])
    keys = ("scale_factor_temporal", "scale_factor_spatial", "patch_size", "is_residual")
    older = changed(folders["wan-2.1"], tmp_path / "vae", "vae/config.json", **dict.fromkeys(keys))
    keys = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "patch_size")
    older = changed(older, tmp_path / "transformer", "transformer/config.json", **dict.fromkeys(keys))
    older = changed(older, tmp_path / "index", "model_index.json", transformer_2=None, expand_timesteps=None)
    assert open_wan(older).variant == known.variant


def test_a_boundary_without_a_second_transformer_means_nothing(folders, tmp_path):
    """As some folders of 2.1 image-to-video have it, where the plain pipeline would ask a transformer that is none."""
    folder = changed(folders["wan-2.1-i2v"], tmp_path / "stray", "model_index.json", boundary_ratio=0.9)
    family = open_wan(folder)
    assert family.noise_range == (0.0, 1.0) and list(family.load_transformers(torch.float32)) == ["transformer"]
    pipeline = family.load_pipeline(torch.float32)
    parts = {name: getattr(pipeline, name) for name in ("vae", "transformer", "image_encoder", "image_processor")}
    assert pipeline.config.boundary_ratio is None and family.pipeline(**parts).config.boundary_ratio is None


@pytest.mark.parametrize("task", [TEXT_TO_VIDEO, IMAGE_TO_VIDEO])
@pytest.mark.parametrize("declared", ["WanPipeline", "WanImageToVideoPipeline"])
def test_the_5b_model_does_both_tasks_whatever_its_index_declares(folders, tmp_path, declared, task):
    folder = changed(folders["wan-2.2-5b"], tmp_path / "model", "model_index.json", _class_name=declared)
    family = open_wan(folder, task=task)
    whole = family.load_pipeline(torch.float32)
    for pipeline in (whole, family.pipeline(vae=whole.vae, transformer=whole.transformer)):
        assert type(pipeline).__name__ == ("WanPipeline" if task == TEXT_TO_VIDEO else "WanImageToVideoPipeline")
        assert pipeline.config.expand_timesteps and pipeline.scheduler.config.shift == 5.0


REFUSED = [
    ("wan-2.1", {"experts": "both"}, "model.experts is for Wan 2.2 A14B"),
    ("wan-2.2-5b", {"experts": "low_noise"}, "this model has one transformer, so leave it out"),
    ("wan-2.1", {"task": IMAGE_TO_VIDEO}, "'image-to-video' is not supported"),
    ("wan-2.1-i2v", {"task": TEXT_TO_VIDEO}, "'text-to-video' is not supported"),
    ("wan-2.2-a14b", {"embedded_guidance": 6.0}, "model.embedded_guidance is no option of wan"),
]


@pytest.mark.parametrize(("variant", "options", "said"), REFUSED)
def test_options_that_the_model_has_not_are_refused(folders, variant, options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        open_wan(folders[variant], **options)


def test_a_transformer_of_other_channels_is_refused(folders, tmp_path):
    folder = changed(folders["wan-2.1"], tmp_path / "control", "transformer/config.json", in_channels=52)
    with pytest.raises(UserError, match=r"takes 52 channels; supported are 16 \(text-to-video\) and 36"):
        open_wan(folder)


# variant, task, condition, frames -> what the refusal says
CONDITIONS = [
    ("wan-2.1", TEXT_TO_VIDEO, NONE, 1, None),
    ("wan-2.1", TEXT_TO_VIDEO, FIRST, 9, "leave data.conditions out"),
    ("wan-2.2-5b", TEXT_TO_VIDEO, FIRST, 9, "set model.task to image-to-video"),
    ("wan-2.2-5b", IMAGE_TO_VIDEO, FIRST, 9, None),
    ("wan-2.2-5b", IMAGE_TO_VIDEO, NONE, 1, None),
    ("wan-2.2-5b", IMAGE_TO_VIDEO, FIRST, 1, "nothing left to learn"),
    ("wan-2.2-5b", IMAGE_TO_VIDEO, FIRST_LAST, 9, "given first or none, not first_last"),
    ("wan-2.2-5b", IMAGE_TO_VIDEO, Condition(5), 9, "not prefix-5"),
    ("wan-2.1-i2v", IMAGE_TO_VIDEO, FIRST, 9, None),
    ("wan-2.1-i2v", IMAGE_TO_VIDEO, FIRST, 1, "nothing left to learn"),
    ("wan-2.1-i2v", IMAGE_TO_VIDEO, FIRST_LAST, 9, "given first, not first_last"),
    ("wan-2.1-i2v", IMAGE_TO_VIDEO, NONE, 9, "the shares of data.conditions must add up to 1"),
    ("wan-2.1-flf2v", IMAGE_TO_VIDEO, FIRST_LAST, 5, None),
    ("wan-2.1-flf2v", IMAGE_TO_VIDEO, FIRST, 5, "given first_last, not first"),
    ("wan-2.2-a14b-i2v", IMAGE_TO_VIDEO, FIRST_LAST, 5, None),
    ("wan-2.2-a14b-i2v", IMAGE_TO_VIDEO, NONE, 5, "given first or first_last, not none"),
]


@pytest.mark.parametrize(("variant", "task", "condition", "frames", "said"), CONDITIONS)
def test_conditions_are_those_that_the_pipeline_can_be_given(folders, variant, task, condition, frames, said):
    reason = open_wan(folders[variant], task=task).check_condition(condition, Bucket(frames, 64, 64))
    assert reason is None if said is None else said in str(reason)


def test_the_mask_marks_the_given_frames_of_each_latent():
    # 9 frames are 3 latents: frame 0 four times, then 1 to 4, then 5 to 8.
    latents = torch.zeros(16, 3, 2, 5)
    first, both = (given_mask(condition, latents, 4) for condition in (FIRST, FIRST_LAST))
    assert first.shape == (4, 3, 2, 5)
    assert first[:, :, 0, 0].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert both[:, :, 1, 4].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(("variant", "condition"), [("wan-2.1-i2v", FIRST), ("wan-2.1-flf2v", FIRST_LAST)])
def test_only_the_given_frames_are_seen(folders, variant, condition):
    family = open_wan(folders[variant])
    encoders = family.load_video_encoders(CPU, torch.float32)

    def encoded(video: Tensor) -> dict[str, Tensor]:
        return family.encode_condition(encoders, video, condition, torch.Generator())

    known, middle, end = encoded(CLIP), CLIP.clone(), CLIP.clone()
    middle[1:-1] = 0
    end[-1] = 0
    assert known.keys() == {"condition", "image_embeds"}
    assert known["image_embeds"].shape == (1 + condition.num_last, IMAGE_TOKENS, 8)
    assert all(torch.equal(tensor, known[name]) for name, tensor in encoded(middle).items())
    for name, tensor in encoded(end).items():
        assert torch.equal(tensor, known[name]) == (condition == FIRST)
    if condition == FIRST_LAST:
        torch.testing.assert_close(encoded(CLIP.flip(0))["image_embeds"], known["image_embeds"].flip(0))


@pytest.mark.parametrize("variant", ["wan-2.1", "wan-2.2-5b"])
def test_the_first_latent_of_a_clip_is_that_of_its_first_frame(folders, variant):
    """Why the 5B model's given frame is not encoded a second time."""
    family = open_wan(folders[variant])
    encoders = family.load_video_encoders(CPU, torch.float32)
    video = random_clip(Bucket(9, 64, 96))
    clip, frame = (family.encode_video(encoders, part) for part in (video, video[:1]))
    torch.testing.assert_close(clip["mean"][:, :1], frame["mean"], rtol=0, atol=1e-6)
    assert not family.needs_encoding(FIRST) or variant == "wan-2.1"


def test_tokens_of_a_given_frame_have_timestep_0_and_all_others_the_samples_own(folders):
    family = open_wan(folders["wan-2.2-5b"], task=IMAGE_TO_VIDEO)
    calls: list[dict[str, Any]] = []

    class Recorder(torch.nn.Module):
        dtype = torch.float32

        def forward(self, **call: Any) -> tuple[Tensor]:
            calls.append(call)
            return (call["hidden_states"],)

    recorder = Recorder()
    noisy, clean = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 48, 3, 4, 6)
    text = {"prompt_embeds": torch.zeros(2, 512, 32)}
    rows = [family.given(FIRST, latents, {}, None) for latents in clean]
    given = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for known in (given, {}):
        timestep = torch.tensor([300.0, 700.5])
        family.predict({"transformer": recorder}, noisy, timestep, text=text, given=known, fps_B=rates(24.0, 24.0))
    first, none = calls
    assert first["timestep"].tolist() == [[0.0] * 6 + [300.0] * 12, [0.0] * 6 + [700.5] * 12]
    assert none["timestep"].tolist() == [[300.0] * 18, [700.5] * 18]
    assert torch.equal(first["hidden_states"][:, :, 0], clean[:, :, 0])
    assert torch.equal(first["hidden_states"][:, :, 1:], noisy[:, :, 1:])
    assert torch.equal(none["hidden_states"], noisy)


EXPERTS = [("high_noise", ["transformer"], (0.875, 1.0)), ("low_noise", ["transformer_2"], (0.0, 0.875))]


@pytest.mark.parametrize(("experts", "names", "noise_range"), EXPERTS)
def test_one_expert_is_trained_by_itself_and_sampled_with_the_other(folders, experts, names, noise_range):
    family = open_wan(folders["wan-2.2-a14b"], experts=experts)
    assert family.noise_range == noise_range
    trained = family.load_transformers(torch.bfloat16)
    assert list(trained) == names
    pipeline = family.pipeline(vae=None, **trained)
    whole = open_wan(folders["wan-2.2-a14b"]).load_transformers(torch.bfloat16)
    for name, expected in whole.items():
        loaded = getattr(pipeline, name)
        assert (loaded is trained.get(name)) == (name in names) and loaded.dtype == torch.bfloat16
        assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in expected.state_dict().items())


def test_each_sample_is_answered_by_the_expert_of_its_noise(folders):
    family = open_wan(folders["wan-2.2-a14b-i2v"])
    models: dict[str, Any] = family.load_transformers(torch.float32)
    # A text encoder that is trained too stands among the models.
    models["text_encoder"] = None
    _, inputs = inputs_of(family, CLIP, FIRST)
    both = {kind: {key: torch.cat([value, -value, value]) for key, value in inputs[kind].items()} for kind in inputs}
    latents = torch.randn(3, 16, 3, 4, 6)
    # The boundary itself belongs to much noise.
    timestep = torch.tensor([899.9, 900.0, 950.0])
    asked = ("transformer_2", "transformer", "transformer")
    with torch.no_grad():
        together = family.predict(models, latents, timestep, fps_B=rates(16.0, 16.0, 16.0), **both)
        for row, name in enumerate(asked):
            own = {kind: {key: tensor[row : row + 1] for key, tensor in both[kind].items()} for kind in both}
            part = slice(row, row + 1)
            alone = family.predict({name: models[name]}, latents[part], timestep[part], fps_B=rates(16.0), **own)
            torch.testing.assert_close(together[part], alone)


MESSY = "  A &amp;amp; B\n\t on\u00a0 a   hill &lt;3 "
LONG = "x" * 600


def test_text_is_that_of_the_pipeline(folders):
    family = open_wan(folders["wan-2.1"])
    tokens = family.tokenize(family.load_tokenizers(), [MESSY, LONG, ""])
    encoders = family.load_text_encoders(CPU, torch.float32)
    with torch.no_grad():
        ours = family.embed(encoders, tokens)["prompt_embeds"]
    pipeline = WanPipeline.from_pretrained(folders["wan-2.1"])
    theirs, _ = pipeline.encode_prompt([MESSY, LONG, ""], do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5)
    # "A & B on a hill <3" is its letters, the spaces between words and the end.
    lengths = [int((row != 0).any(1).sum()) for row in ours]
    assert lengths == [len("A & B on a hill <3") + 2, 512, 1]


def test_captions_are_counted_as_they_are_cleaned(folders):
    family = open_wan(folders["wan-2.1"])
    counts = family.count_tokens(family.load_tokenizers(), [MESSY, LONG, "caf\u00e9"])
    assert [count.num_tokens for count in counts] == [20, 602, 6]
    assert [count.num_unknown for count in counts] == [0, 0, 1]
    assert {count.limit for count in counts} == {512}


def test_gradients_reach_the_text_encoder_from_the_rows_of_the_text_alone(folders):
    family = open_wan(folders["wan-2.1"])
    encoder = family.load_text_encoders(CPU, torch.float32)["text_encoder"].requires_grad_(True)
    tokens = family.tokenize(family.load_tokenizers(), ["hill"])
    embeds = family.embed({"text_encoder": encoder}, tokens)["prompt_embeds"]
    embeds[:, 6:].sum().backward(retain_graph=True)
    assert encoder.shared.weight.grad.abs().sum() == 0
    embeds.sum().backward()
    assert encoder.shared.weight.grad.abs().sum() > 0


def angles(frames: int, method: str) -> list[list[float]]:
    """By hand, for a time axis of 8 features and 21 trained latents: positions x frequencies."""
    wanted = (frames - 1) // 4 + 1
    frequencies = [10_000 ** (-k / 4) for k in range(4)]
    positions = [float(position) for position in range(64)]
    if method == "interpolate":
        positions = [position * 21 / wanted for position in positions]
    if method == "ntk":
        frequencies = [(10_000 * (wanted / 21) ** (8 / 6)) ** (-k / 4) for k in range(4)]
    if method == "riflex":
        # Periods are 6.3 and 62.8 latents: the second is the first that 21 latents see no more than once.
        frequencies[1] = 0.9 * 2 * math.pi / wanted
    return [[position * frequency for frequency in frequencies] for position in positions]


@pytest.mark.parametrize("method", ["interpolate", "ntk", "riflex"])
def test_positions_in_time_reach_further_wherever_the_model_is_loaded(folders, method):
    plain = open_wan(folders["wan-2.2-a14b"]).load_transformers(torch.bfloat16)["transformer"]
    options = {"experts": "high_noise", "rope_temporal": RopeTemporal(method=method, frames=253)}
    family = open_wan(folders["wan-2.2-a14b"], **options)
    trained = family.load_transformers(torch.bfloat16)
    sampled, whole = family.pipeline(vae=None, **trained), family.load_pipeline(torch.bfloat16)
    expected = torch.tensor(angles(253, method), dtype=torch.float64).repeat_interleave(2, dim=1)
    for transformer in (trained["transformer"], sampled.transformer_2, whole.transformer, whole.transformer_2):
        rope = transformer.rope
        assert rope.freqs_cos.dtype == rope.freqs_sin.dtype == torch.float32
        torch.testing.assert_close(rope.freqs_cos[:, :8].double(), expected.cos(), rtol=0, atol=1e-6)
        torch.testing.assert_close(rope.freqs_sin[:, :8].double(), expected.sin(), rtol=0, atol=1e-6)
        assert torch.equal(rope.freqs_cos[:, 8:], plain.rope.freqs_cos[:, 8:]), "height and width stay"
        assert transformer.state_dict().keys() == plain.state_dict().keys()


def test_each_part_has_the_type_that_it_needs(folders):
    family = open_wan(folders["wan-2.1-i2v"])
    encoders = family.load_video_encoders(CPU, torch.bfloat16)
    assert encoders["vae"].dtype == encoders["image_encoder"].dtype == torch.float32
    pipeline = family.load_pipeline(torch.bfloat16)
    assert pipeline.vae.dtype == pipeline.image_encoder.dtype == torch.float32
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    transformer = family.load_transformers(torch.bfloat16)["transformer"]
    types = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    assert types["scale_shift_table"] == types["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert types["blocks.0.attn1.to_q.weight"] == transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_bf16_arithmetic_answers_in_fp32_and_trains(folders, weights):
    """bf16 weights as LoRA has them, and fp32 weights under autocast as full fine-tuning has them."""
    family = open_wan(folders["wan-2.1-i2v"])
    transformer = family.load_transformers(weights)["transformer"].train()
    latents, inputs = inputs_of(family, CLIP, FIRST)
    exact = family.load_transformers(torch.float32)
    noisy, timestep = torch.randn_like(latents), torch.tensor([512.3])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        answer = family.predict({"transformer": transformer}, noisy, timestep, fps_B=rates(16.0), **inputs)
    answer.square().mean().backward()
    assert answer.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in transformer.parameters())
    with torch.no_grad():
        expected = family.predict(exact, noisy, timestep, fps_B=rates(16.0), **inputs)
    assert (answer - expected).norm() < 0.03 * expected.norm()


def test_whole_timesteps_are_answered_as_the_published_schedule_has_them(folders, tmp_path):
    """UniPC rounds down to whole numbers of type int64; training gives the same number in fp32."""
    family = open_wan(write_tiny_wan(tmp_path / "model", variant="wan-2.1", unipc=True))
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    calls, answers = recorded(pipeline), []
    pipeline.transformer.register_forward_hook(lambda module, args, output: answers.append(output[0]))
    options = SamplingOptions(3, 1.0, 16.0, seed=0)
    family.render(pipeline, Bucket(9, 32, 48), options, prompt="a hill", negative_prompt="")
    assert {call["timestep"].dtype for _, call in calls} == {torch.int64}
    for answer, (_, call) in zip(list(answers), list(calls), strict=True):
        text = {"prompt_embeds": call["encoder_hidden_states"]}
        models, timestep = {"transformer": pipeline.transformer}, call["timestep"].float()
        with torch.no_grad():
            ours = family.predict(models, call["hidden_states"], timestep, text=text, given={}, fps_B=rates(16.0))
        torch.testing.assert_close(ours, answer)


GUIDANCE = [
    ("wan-2.1", None, (5.0, None)),
    ("wan-2.1", 7.0, (7.0, None)),
    ("wan-2.2-a14b", None, (4.0, 3.0)),
    ("wan-2.2-a14b", 6.0, (6.0, None)),
    ("wan-2.2-a14b-i2v", None, (3.5, 3.5)),
]


@pytest.mark.parametrize(("variant", "given", "expected"), GUIDANCE)
def test_experts_have_their_own_guidance_unless_one_is_given(folders, variant, given, expected):
    family, calls = open_wan(folders[variant]), []

    def pipeline(**call: Any) -> SimpleNamespace:
        calls.append(call)
        return SimpleNamespace(frames=torch.zeros(1, 9, 3, 32, 48))

    embeds = {"prompt_embeds": torch.zeros(1, 512, 32)}
    prompt = family.prompt_arguments(embeds, embeds)
    family.render(pipeline, Bucket(9, 32, 48), SamplingOptions(3, given, 16.0, seed=0), **prompt)
    assert (calls[0]["guidance_scale"], calls[0]["guidance_scale_2"]) == expected


@pytest.mark.parametrize("variant", ["wan-2.1", "wan-2.2-5b"])
def test_tiled_encoding_has_the_same_shape(folders, variant):
    bucket = Bucket(5, 288, 320)
    tiled = find_family(ModelConfig(path=str(folders[variant])), vae_tiling=True)
    encoded = tiled.encode_video(tiled.load_video_encoders(CPU, torch.float32), random_clip(bucket))
    assert tuple(encoded["mean"].shape) == (tiled.latent_channels, *tiled.latent_shape(bucket))
