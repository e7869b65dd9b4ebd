"""Measures the loss on held-out clips and renders sample videos, the same way every time."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetrainers.data.batch import BatchDrawer
from finetrainers.data.cache import Cache
from finetrainers.data.video import write_video
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.folder import RunFolder, slug, step_name, write_atomically
from finetrainers.training.callback import Callback
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.state import StepOutcome
from finetrainers.training.trainer import Trainer
from finetrainers.types import Bucket

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss over held-out clips, each at the same noise levels and the same noise, whatever the step."""

    drawer: BatchDrawer
    num_levels: int

    @property
    def sigmas(self) -> list[float]:
        """Noise levels in the middle of equal shares of (0, 1)."""
        return [(level + 0.5) / self.num_levels for level in range(self.num_levels)]

    def measure(self, trainer: Trainer) -> float:
        """The mean, with the transformer as it is now. Each noise level is a pass of its own, to need no more memory
        than a step of batch size 1."""
        losses = [
            trainer.loss(self.drawer.fixed(index, sigma))
            for index in range(len(self.drawer.samples))
            for sigma in self.sigmas
        ]
        return torch.cat(losses).double().mean().item()


@dataclass(frozen=True)
class SampleVideos:
    """Renders prompts through the diffusers pipeline, around the transformer that is being trained."""

    family: Family
    cache: Cache
    folder: RunFolder
    prompts: Sequence[str]
    text_keys: Sequence[str]
    negative_key: str
    bucket: Bucket
    options: SamplingOptions
    dtype: torch.dtype

    def render(self, trainer: Trainer) -> dict[str, Path]:
        """One mp4 a prompt under `samples/step-N`; returns their paths by prompt."""
        folder = self.folder.samples / step_name(trainer.state.step)
        vae = self.family.load_video_encoder(trainer.device, self.dtype)
        pipeline = self.family.pipeline(transformer=trainer.transformer, vae=vae)
        pipeline.set_progress_bar_config(disable=True)
        negative = self._text(self.negative_key, trainer.device)
        videos = {}
        for number, (prompt, key) in enumerate(zip(self.prompts, self.text_keys, strict=True)):
            arguments = self.family.prompt_arguments(self._text(key, trainer.device), negative)
            with trainer.method.autocast(trainer.device):
                video_FHWC = self.family.render(pipeline, self.bucket, self.options, **arguments)
            videos[prompt] = folder / f"{number:02d}-{slug(prompt)}.mp4"
            write_video(videos[prompt], video_FHWC.numpy(), self.options.fps)
        write_atomically(folder / "prompts.json", json.dumps({path.name: prompt for prompt, path in videos.items()}))
        return videos

    def _text(self, key: str, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in self.cache.read("texts", key).items()}


class Validation(Callback):
    """Every so many steps and before the first. A validation that a kill cut off is made up for after the resume."""

    def __init__(
        self, *, every: int, metrics: MetricsFile, held_out: HeldOutLoss | None, videos: SampleVideos | None
    ) -> None:
        self.every = every
        self.metrics = metrics
        self.held_out = held_out
        self.videos = videos

    def on_start(self, trainer: Trainer) -> None:
        if self._is_due(trainer.state.step) and not self._is_done(trainer.state.step):
            self._validate(trainer)

    def on_step_end(self, trainer: Trainer, outcome: StepOutcome) -> None:
        # A run that was asked to stop saves at once; its validation comes after the resume.
        if self._is_due(outcome.step) and not trainer.stopping:
            self._validate(trainer)

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _is_done(self, step: int) -> bool:
        measured = self.held_out is None or self.metrics.has_validation(step)
        rendered = self.videos is None or (self.videos.folder.samples / step_name(step) / "prompts.json").is_file()
        return measured and rendered and step > 0

    def _validate(self, trainer: Trainer) -> None:
        trainer.transformer.eval()
        metrics, videos = {}, {}
        with torch.no_grad():
            if self.held_out is not None:
                metrics["validation_loss"] = self.held_out.measure(trainer)
                logger.info("step %d: validation loss %.5f", trainer.state.step, metrics["validation_loss"])
            if self.videos is not None:
                videos = self.videos.render(trainer)
        trainer.transformer.train()
        for callback in trainer.callbacks:
            callback.on_validation(trainer, metrics, videos)
