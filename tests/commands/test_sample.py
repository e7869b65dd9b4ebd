"""Videos of a base model and of what was trained, the same for the same seed; wrong input in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from finetrainers.data.video import write_video
from finetrainers.families.find import all_families
from finetrainers.folder import LORA_FILE
from finetrainers.weights import write_loras, write_transformer
from tests.commands.conftest import Answer
from tests.families.tiny import TINY

FAST = ["--size", "9x64x96", "--steps", "2", "--precision", "fp32", "--quiet"]
PROMPT = "a red circle moves"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters on the first attention of the tiny model, strong enough to be seen."""
    return written(tmp_path_factory.mktemp("lora"), "transformer")


LAYERS = {
    "transformer": [f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v", "to_out.0")],
    "text_encoder": [f"encoder.block.{block}.layer.0.SelfAttention.{name}" for block in (0, 1) for name in "qv"],
}


def written(folder: Path, *parts: str, **notes: object) -> Path:
    """A LoRA of these models in a folder."""
    adapters = {}
    for part in parts:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"{layer}.lora_{side}.weight": torch.randn((4, 32) if side == "A" else (32, 4), generator=generator)
            for layer in LAYERS[part]
            for side in "AB"
        }
        adapters[part] = (tensors, {"r": 4, "lora_alpha": 4, "target_modules": LAYERS[part]})
    folder.mkdir(exist_ok=True)
    write_loras(folder, adapters, notes=notes)
    return folder


@pytest.fixture
def render(call: Callable[..., Answer], model: Path, tmp_path: Path) -> Callable[..., list[np.ndarray]]:
    """The frames of each video that `sample` makes with these options."""
    base = model

    def render(*options: object, prompts: tuple[str, ...] = (PROMPT,), model: Path = base) -> list[np.ndarray]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        given = [part for prompt in prompts for part in ("--prompt", prompt)]
        answer = call("sample", model, *given, "--output", tmp_path / "out", *FAST, *options)
        assert answer.code == 0, answer.err
        paths = [Path(line) for line in answer.out.splitlines()]
        assert sorted(paths) == sorted((tmp_path / "out").iterdir()), "one line for each video, and no other file"
        return [frames(path) for path in paths]

    return render


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def differ(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return any(np.abs(a.astype(int) - b).mean() > 0.5 for a, b in zip(one, other, strict=True))


def test_a_video_for_each_prompt(render, tmp_path):
    videos = render("--fps", "8", prompts=(PROMPT, "../../etc/passwd", PROMPT))
    assert [video.shape for video in videos] == [(9, 64, 96, 3)] * 3
    names = ["00-a-red-circle-moves.mp4", "01-etc-passwd.mp4", "02-a-red-circle-moves.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with av.open(str(tmp_path / "out" / names[0])) as container:
        assert container.streams.video[0].average_rate == 8
    assert np.array_equal(videos[0], videos[2]) and differ(videos[:1], videos[1:2])


def test_the_seed_decides(render):
    first = render("--seed", "7")
    again, other = render("--seed", "7"), render("--seed", "8")
    assert [video.tobytes() for video in first] == [video.tobytes() for video in again]
    assert differ(first, other)


def test_a_lora_changes_the_video_by_its_scale(render, lora):
    base, trained = render(), render("--lora", lora)
    assert differ(base, trained)
    assert [v.tobytes() for v in trained] == [v.tobytes() for v in render("--lora", lora / LORA_FILE)]
    assert differ(trained, render("--lora", lora, "--lora-scale", "0.3"))
    assert not differ(base, render("--lora", lora, "--lora-scale", "0"))


def test_a_transformer_changes_the_video(render, model, tmp_path):
    transformer = LTXVideoTransformer3DModel.from_pretrained(model, subfolder="transformer")
    state = {name: tensor * 1.5 for name, tensor in transformer.state_dict().items()}
    write_transformer(tmp_path / "transformer", state, transformer, notes={})
    base, trained = render(), render("--transformer", tmp_path / "transformer")
    assert differ(base, trained)
    assert not differ(trained, render("--transformer", tmp_path)), "the folder that holds it will do"


def test_a_trained_text_encoder_changes_the_video_by_the_same_scale(render, lora, tmp_path):
    both = written(tmp_path / "both", "transformer", "text_encoder")
    base, one, trained = render(), render("--lora", lora), render("--lora", both)
    assert differ(one, trained)
    assert not differ(base, render("--lora", both, "--lora-scale", "0"))
    assert differ(trained, render("--lora", both, "--lora-scale", "0.3"))


def test_weights_bring_what_they_were_trained_with(render, model, lora, tmp_path, monkeypatch):
    """Interpolation to 513 of 257 frames tells the model twice the rate; the weights say so themselves."""
    seen: list[np.ndarray] = []

    def remember(path: Path, video: np.ndarray, fps: float) -> None:
        seen.append(video)
        write_video(path, video, fps)

    # As they are before they are written, because compression depends on the rate.
    monkeypatch.setattr("finetrainers.commands.sample.write_video", remember)
    rope = {"method": "interpolate", "frames": 513}
    noted = written(tmp_path / "noted", "transformer", rope_temporal=rope)
    for weights, fps in ((lora, 8), (lora, 16), (noted, 8)):
        render("--lora", weights, "--fps", fps)
    transformer = LTXVideoTransformer3DModel.from_pretrained(model, subfolder="transformer")
    for name, notes in (("one", {}), ("other", {"rope_temporal": rope})):
        write_transformer(tmp_path / name, transformer.state_dict(), transformer, notes=notes)
    for name, fps in (("one", 8), ("one", 16), ("other", 8)):
        render("--transformer", tmp_path / name, "--fps", fps)
    for at_8, at_16, noted_at_8 in (seen[:3], seen[3:]):
        assert not np.array_equal(at_8, at_16) and np.array_equal(noted_at_8, at_16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red.png", (200, 30, 30)), ("blue.png", (20, 40, 220))):
        Image.new("RGB", (120, 80), colour).save(folder / name)
    return folder / "red.png", folder / "blue.png"


def test_the_first_frame_is_given(render, pictures):
    """The pipeline fits it to the size; another image is another video, and so is none."""
    red, blue = (render("--image", picture) for picture in pictures)
    assert red[0].shape == (9, 64, 96, 3)
    assert differ(red, blue) and differ(red, render())
    assert not differ(red, render("--image", pictures[0]))


def test_the_last_frame_is_given_where_the_model_takes_one(render, pictures, tmp_path):
    causal = TINY["ltx-0.9.5-i2v"].write(tmp_path / "causal")
    first, last = pictures
    only, both = (render("--image", first, *more, model=causal) for more in ((), ("--last-image", last)))
    assert differ(only, both)
    assert differ(both, render("--image", first, "--last-image", first, model=causal))


@pytest.mark.parametrize(
    "options", [("--guidance-scale", "9"), ("--negative-prompt", "blue"), ("--steps", "5")], ids=lambda given: given[0]
)
def test_each_option_reaches_the_pipeline(render, options):
    assert differ(render(), render(*options))


def test_bf16_is_the_default(call, model, tmp_path):
    answer = call(
        "sample", model, "--prompt", PROMPT, "--output", tmp_path, "--size", "9x32x32", "--steps", "2", "--quiet"
    )
    assert answer.code == 0, answer.err
    assert frames(Path(answer.out.strip())).shape == (9, 32, 32, 3)


WRONG = {
    "a size that the model cannot take": (["--size", "10x64x96"], ["--size 10x64x96", "8k+1", "9x64x96"]),
    "a size that is none": (["--size", "9x64"], ["'9x64'", "FRAMESxHEIGHTxWIDTH"]),
    "a missing lora": (["--lora", "nowhere.safetensors"], ["--lora nowhere.safetensors", LORA_FILE]),
    "a folder without lora": (["--lora", "EMPTY"], ["--lora", LORA_FILE]),
    "one step, which the schedule cannot divide": (["--steps", "1"], ["at least 2 denoising steps"]),
    "no steps": (["--steps", "0"], ["--steps", "0"]),
    "a rate of nothing": (["--fps", "0"], ["--fps", "0"]),
    "a rate that is no number": (["--fps", "nan"], ["--fps", "nan"]),
    "a lora that says nonsense of itself": (["--lora", "NONSENSE"], ["--lora", "rope_temporal", "yarn"]),
    "a missing transformer": (["--transformer", "EMPTY"], ["--transformer", "config.json"]),
    "a file that is no lora": (["--lora", "OTHER.safetensors"], ["--lora"]),
    "a torn lora": (["--lora", "TORN.safetensors"], ["--lora"]),
    "weights of another model": (["--lora", "MISFIT.safetensors"], ["--lora"]),
    "an image that is none": (
        ["--image", "TORN.safetensors"],
        ["--image", "TORN.safetensors: cannot be read as an image"],
    ),
    "an image that is nowhere": (["--image", "nowhere.png"], ["--image nowhere.png: cannot be read as an image"]),
    "a last image alone": (["--last-image", "PICTURE.png"], ["--last-image needs --image"]),
    "a last image that the model takes not": (
        ["--image", "PICTURE.png", "--last-image", "PICTURE.png"],
        ["--last-image", "first frame or none"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(call, model, lora, tmp_path, case):
    options, parts = WRONG[case]
    (tmp_path / "EMPTY").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "OTHER.safetensors")
    (tmp_path / "TORN.safetensors").write_bytes((lora / LORA_FILE).read_bytes()[:-9])
    Image.new("RGB", (96, 64)).save(tmp_path / "PICTURE.png")
    written(tmp_path / "NONSENSE", "transformer", rope_temporal={"method": "yarn", "frames": 9})
    misfit = {name: tensor[..., :3].contiguous() for name, tensor in load_file(lora / LORA_FILE).items()}
    save_file(misfit, tmp_path / "MISFIT.safetensors")
    options = [str(tmp_path / option) if option.split(".")[0].isupper() else option for option in options]
    given = ["--prompt", PROMPT, "--output", tmp_path / "out", "--size", "9x64x96", "--steps", "2"]
    refusal = call("sample", model, *given, *options).refusal
    assert all(part in refusal for part in parts), refusal
    assert not (tmp_path / "out").exists()


def test_an_unknown_model(call, tmp_path):
    assert "nowhere" in call("sample", tmp_path / "nowhere", "--prompt", PROMPT).refusal
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refusal = call("sample", tmp_path, "--prompt", PROMPT).refusal
    assert "FluxPipeline" in refusal and "supported are: " in refusal
    assert all(name in refusal for kind in all_families() for name in (kind.name, *kind.pipelines))


def test_a_prompt_must_be_given(call, model):
    answer = call("sample", model)
    assert answer.code == 2 and "--prompt" in answer.err
