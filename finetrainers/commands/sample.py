"""`finetrainers sample`: render videos with a base model and, if given, trained weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from finetrainers.commands.precompute import DTYPES
from finetrainers.data.video import write_video
from finetrainers.errors import UserError
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.families.find import find_family
from finetrainers.folder import LORA_FILE, slug
from finetrainers.types import Bucket


@dataclass(frozen=True)
class Request:
    """What the command line asked for; see `finetrainers sample --help`."""

    model: str
    prompt: list[str]
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
    weights = find_lora(request.lora) if request.lora else None
    family = find_family(request.model, revision=None, task="text-to-video")
    bucket = check_size(family, request.size)
    fps = family.default_fps if request.fps is None else request.fps
    if request.steps < 1 or not 0 < fps <= 1000:
        raise UserError(f"--steps must be at least 1 and --fps up to 1000, but they are {request.steps} and {fps}")
    pipeline = family.load_pipeline(DTYPES[request.precision])
    if request.transformer:
        pipeline.transformer = load_transformer(pipeline, Path(request.transformer), DTYPES[request.precision])
    if weights:
        load_lora(pipeline, weights, request.lora_scale)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    options = SamplingOptions(request.steps, request.guidance_scale, fps, request.seed)
    for number, text in enumerate(request.prompt):
        prompts = {"prompt": text, "negative_prompt": request.negative_prompt}
        path = Path(request.output) / f"{number:02d}-{slug(text)}.mp4"
        write_video(path, family.render(pipeline, bucket, options, **prompts).numpy(), fps)
        print(path)
    return 0


def find_lora(given: str) -> Path:
    """The LoRA file that a path means: the file itself, or the one in that folder."""
    path = Path(given)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--lora {given}: no such file; give {LORA_FILE} or the folder that holds it")
    return file


def load_lora(pipeline: Any, file: Path, scale: float) -> None:
    """Put a LoRA beside the transformer's weights. Raises UserError when it does not fit them, or is none."""
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="lora", use_safetensors=True)
        pipeline.set_adapters(["lora"], [scale])
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--lora {file}: cannot be loaded into this model: {reason}") from error


def check_size(family: Family, size: str | None) -> Bucket:
    """The size to render, if the model can."""
    bucket = Bucket.parse(size or family.defaults("lora")["data.buckets"][0])
    if reason := family.check_bucket(bucket):
        raise UserError(f"--size {bucket}: {reason}")
    return bucket


def load_transformer(pipeline: Any, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A fully fine-tuned transformer: the folder itself, or the one that holds it."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"--transformer {path}: no config.json there; give a transformer/ folder that a run saved")
    kind = type(pipeline.transformer)
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
