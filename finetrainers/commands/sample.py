"""`finetrainers sample`: render videos with a base model and, if given, trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from finetrainers.commands.completing import DTYPES
from finetrainers.config.schema import ModelConfig
from finetrainers.data.image import read_image
from finetrainers.data.video import write_video
from finetrainers.errors import UnusableClip, UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, Family, SamplingOptions
from finetrainers.families.find import find_family
from finetrainers.folder import LORA_FILE, slug
from finetrainers.types import Bucket, Condition
from finetrainers.weights import SECOND, load_text_encoder_lora, read_notes


@dataclass(frozen=True)
class Request:
    """What the command line asked for; see `finetrainers sample --help`."""

    model: str
    prompt: list[str]
    family: str | None = None
    image: str | None = None
    last_image: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    transformer: str | None = None
    output: str = "."
    size: str | None = None
    fps: float | None = None
    steps: int = 30
    guidance_scale: float | None = None
    negative_prompt: str = ""
    seed: int = 42
    precision: str = "bf16"


def sample(**given: Any) -> int:
    """One mp4 a prompt under `output`; prints their paths. Takes the fields of Request."""
    request = Request(**given)
    family = open_family(request)
    bucket = check_size(family, request.size)
    images = read_images(family, bucket, request)
    fps = family.default_fps if request.fps is None else request.fps
    if request.steps < 1 or not 0 < fps <= 1000:
        raise UserError(f"--steps must be at least 1 and --fps up to 1000, but they are {request.steps} and {fps}")
    pipeline = family.load_pipeline(DTYPES[request.precision])
    if request.transformer:
        load_transformers(pipeline, Path(request.transformer), DTYPES[request.precision])
    if request.lora:
        load_loras(pipeline, Path(request.lora), request.lora_scale)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    options = SamplingOptions(request.steps, request.guidance_scale, fps, request.seed)
    for number, text in enumerate(request.prompt):
        prompts = {"prompt": text, "negative_prompt": request.negative_prompt}
        path = Path(request.output) / f"{number:02d}-{slug(text)}.mp4"
        write_video(path, family.render(pipeline, bucket, options, **images, **prompts).numpy(), fps)
        print(path)
    return 0


def open_family(request: Request) -> Family:
    """The model's family, for the task that the request implies and as the trained weights say they were made."""
    weights = {"--lora": find_loras(Path(request.lora))[0][1]} if request.lora else {}
    weights |= {"--transformer": find_transformers(Path(request.transformer))[0][1]} if request.transformer else {}
    task = IMAGE_TO_VIDEO if request.image else None
    family = find_family(ModelConfig(path=request.model, family=request.family, task=task, **read_settings(weights)))
    if family.task == IMAGE_TO_VIDEO and not request.image:
        raise UserError(f"{request.model} animates an image; give its file with --image")
    return family


def read_settings(weights: Mapping[str, Path]) -> dict[str, Any]:
    """The options of `model` that trained weights carry, by how they were given. Raises UserError for a file that is
    none."""
    notes: dict[str, Any] = {}
    for given, path in weights.items():
        try:
            notes |= read_notes(path)
            ModelConfig(path=".", **notes)
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{given} {path} cannot be read as trained weights: {reason}") from error
    return notes


def read_images(family: Family, bucket: Bucket, request: Request) -> dict[str, Image.Image]:
    """The frames that are given, as `Family.render` takes them: fitted to the video's size as clips are for training,
    since a pipeline would stretch them."""
    images = {}
    for name, given in (("image", request.image), ("last_image", request.last_image)):
        if given is None:
            continue
        try:
            frame_CHW = read_image(Path(given), height=bucket.height, width=bucket.width)[0]
        except (UnusableClip, OSError) as error:
            raise UserError(f"--{name.replace('_', '-')} {given}: {error}") from None
        images[name] = Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())
    if "last_image" in images and "image" not in images:
        raise UserError("--last-image needs --image, the first frame, too")
    condition = Condition(int("image" in images), int("last_image" in images))
    if reason := family.check_condition(condition, bucket):
        raise UserError(f"--image and --last-image: {reason}")
    return images


def find_loras(path: Path) -> list[tuple[str, Path]]:
    """The LoRA files that a path means, each with the transformer that it is for: the file itself, or those in a folder
    that a run wrote."""
    if path.is_file():
        return [("transformer", path)]
    files = [("transformer", path / LORA_FILE), (SECOND, path / SECOND / LORA_FILE)]
    if found := [(part, file) for part, file in files if file.is_file()]:
        return found
    raise UserError(f"--lora {path}: no such file; give {LORA_FILE} or the folder that holds it")


def load_loras(pipeline: Any, path: Path, scale: float) -> None:
    """Put LoRAs beside the weights of the transformers, and of the text encoder where it was trained too. Raises
    UserError when one does not fit, or is none."""
    for part, file in find_loras(path):
        second = {"load_into_transformer_2": True} if part == SECOND else {}
        try:
            pipeline.load_lora_weights(
                file.parent, weight_name=file.name, adapter_name="lora", use_safetensors=True, **second
            )
            load_text_encoder_lora(pipeline.text_encoder, file, scale=scale)
        except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--lora {file}: cannot be loaded into this model: {reason}") from error
    pipeline.set_adapters(["lora"], [scale])


def check_size(family: Family, size: str | None) -> Bucket:
    """The size to render, if the model can."""
    bucket = Bucket.parse(size or family.defaults("lora")["data.buckets"][0])
    if reason := family.check_bucket(bucket):
        raise UserError(f"--size {bucket}: {reason}")
    return bucket


def find_transformers(path: Path) -> list[tuple[str, Path]]:
    """The fully fine-tuned transformers that a path means: the folder itself, or those in a folder that a run wrote."""
    if (path / "config.json").is_file():
        return [(SECOND if path.name == SECOND else "transformer", path)]
    if found := [(part, path / part) for part in ("transformer", SECOND) if (path / part / "config.json").is_file()]:
        return found
    raise UserError(f"--transformer {path}: no config.json there; give a transformer/ folder that a run saved")


def load_transformers(pipeline: Any, path: Path, dtype: torch.dtype) -> None:
    """Put fully fine-tuned weights in the place of those of the pipeline's transformers, which keep what the family
    made of them, such as longer positions."""
    for part, folder in find_transformers(path):
        transformer = getattr(pipeline, part)
        try:
            weights = type(transformer).from_pretrained(folder, dtype=dtype, use_safetensors=True).state_dict()
            transformer.load_state_dict(weights, assign=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--transformer {folder}: cannot be loaded into this model: {reason}") from error
