"""`finetrainers sample`: render videos with a base model and, if given, trained weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from finetrainers.commands.precompute import DTYPES
from finetrainers.data.video import write_video
from finetrainers.errors import UserError
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.families.find import find_family
from finetrainers.folder import LORA_FILE, slug
from finetrainers.types import Bucket

logger = logging.getLogger(__name__)


def sample(
    model: str,
    *,
    prompt: list[str],
    lora: str | None,
    lora_scale: float,
    transformer: str | None,
    output: str,
    size: str | None,
    fps: float | None,
    steps: int,
    guidance_scale: float | None,
    negative_prompt: str,
    seed: int,
    precision: str,
) -> int:
    """One mp4 a prompt under `output`; prints their paths."""
    weights = find_lora(lora) if lora else None
    family = find_family(model, revision=None, task="text-to-video")
    bucket = check_size(family, size)
    if steps < 1 or (fps is not None and fps <= 0):
        raise UserError(f"--steps must be at least 1 and --fps more than 0, but are {steps} and {fps}")
    pipeline = family.load_pipeline(DTYPES[precision])
    if transformer:
        pipeline.transformer = load_transformer(pipeline, Path(transformer), DTYPES[precision])
    if weights:
        pipeline.load_lora_weights(weights.parent, weight_name=weights.name, adapter_name="lora")
        pipeline.set_adapters(["lora"], [lora_scale])
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    options = SamplingOptions(steps, guidance_scale, fps or family.default_fps, seed)
    for number, text in enumerate(prompt):
        video_FHWC = family.render(pipeline, bucket, options, prompt=text, negative_prompt=negative_prompt)
        path = Path(output) / f"{number:02d}-{slug(text)}.mp4"
        write_video(path, video_FHWC.numpy(), options.fps)
        print(path)
    return 0


def find_lora(given: str) -> Path:
    """The LoRA file that a path means: the file itself, or the one in that folder."""
    path = Path(given)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--lora {given}: no such file; give {LORA_FILE} or the folder that holds it")
    return file


def check_size(family: Family, size: str | None) -> Bucket:
    """The size to render, if the model can."""
    bucket = Bucket.parse(size or family.defaults("lora")["data.buckets"][0])
    if reason := family.check_bucket(bucket):
        raise UserError(f"--size {bucket}: {reason}")
    return bucket


def load_transformer(pipeline: object, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A fully fine-tuned transformer: the folder itself, or the one that holds it."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"--transformer {path}: no config.json there; give a transformer/ folder that a run saved")
    kind = type(pipeline.transformer)  # type: ignore[attr-defined]
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
