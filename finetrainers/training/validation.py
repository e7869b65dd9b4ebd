"""Measures the loss on held-out clips and renders sample videos, the same way every time."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetrainers.data.batch import BatchDrawer
from finetrainers.data.cache import Cache
from finetrainers.data.clip import read_clip
from finetrainers.data.scan import Item
from finetrainers.data.video import write_video
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.folder import RunFolder, slug, step_name, write_atomically
from finetrainers.memory.exhausted import told
from finetrainers.training.callback import Callback
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.state import StepOutcome
from finetrainers.training.trainer import Trainer
from finetrainers.types import Bucket, Condition

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss over held-out clips, each at the same noise levels and the same noise, whatever the step."""

    drawer: BatchDrawer
    num_levels: int
    noise_range: tuple[float, float]

    @property
    def levels(self) -> list[float]:
        """Noise levels in the middle of equal shares of the range that is trained."""
        low, high = self.noise_range
        return [low + (high - low) * (level + 0.5) / self.num_levels for level in range(self.num_levels)]

    def measure(self, trainer: Trainer) -> float:
        """The mean, with the models as they are now; every process takes its share. Each noise level is a pass of its
        own, to need no more memory than a step of batch size 1."""
        engine = trainer.engine
        passes = [(index, level) for index in range(len(self.drawer.samples)) for level in self.levels]
        # Where a pass needs all processes, those that have none left repeat the last; what it gives is not looked at.
        padding = passes[-1:] * (-len(passes) % engine.data_size if engine.together else 0)
        mine = (passes + padding)[engine.data_rank :: engine.data_size]
        losses = [trainer.loss(self.drawer.fixed(*each)) for each in mine]
        # Processes that split a pass have the same of it.
        shares = engine.gather(torch.cat(losses).tolist() if losses else [])[:: engine.context_size]
        # In the order of one process, so that their number does not change the sum.
        order = (divmod(number, engine.data_size) for number in range(len(passes)))
        return statistics.fmean(shares[share][turn] for turn, share in order)


@dataclass(frozen=True)
class Scene:
    """What one sample video is made from."""

    prompt: str
    text_key: str
    negative_key: str
    item: Item | None
    """The clip or image whose frames are given, at the video's height and width; None for text alone."""


@dataclass(frozen=True)
class SampleVideos:
    """Renders scenes through the diffusers pipeline, around the models that are being trained."""

    family: Family
    cache: Cache
    folder: RunFolder
    scenes: Sequence[Scene]
    condition: Condition
    """Which frames of a scene's item are given."""
    bucket: Bucket
    options: SamplingOptions
    dtype: torch.dtype

    def render(self, trainer: Trainer) -> dict[str, Path]:
        """One mp4 a scene under `samples/step-N`; every process takes its share. Returns their paths by prompt."""
        engine, folder = trainer.engine, self.folder.samples / step_name(trainer.state.step)
        videos: dict[str, Path] = {}
        for number, scene in enumerate(self.scenes):
            name = scene.prompt if scene.prompt not in videos else f"{scene.prompt} ({number})"
            videos[name] = folder / f"{number:02d}-{slug(scene.prompt)}.mp4"
        shots = list(zip(self.scenes, videos.values(), strict=True))
        padding = [(self.scenes[-1], None)] * (-len(shots) % engine.data_size if engine.together else 0)
        if mine := [*shots, *padding][engine.data_rank :: engine.data_size]:
            self._shoot(trainer, mine)
        engine.wait()
        if engine.is_main:
            prompts = json.dumps({path.name: prompt for prompt, path in videos.items()})
            write_atomically(folder / "prompts.json", prompts)
        return videos

    def _shoot(self, trainer: Trainer, shots: Sequence[tuple[Scene, Path | None]]) -> None:
        """Render scenes, each into its file."""
        encoders = self.family.load_video_encoders(trainer.device, self.dtype)
        transformers = {name: model for name, model in trainer.models.items() if name.startswith("transformer")}
        pipeline = self.family.pipeline(**transformers, **encoders)
        pipeline.set_progress_bar_config(disable=True)
        for scene, path in shots:
            with trainer.method.autocast(trainer.device):
                text = self._text(trainer, scene.text_key)
                prompt = self.family.prompt_arguments(text, self._text(trainer, scene.negative_key))
                video_FHWC = self.family.render(
                    pipeline, self.bucket, self.options, **given_images(scene.item, self.condition), **prompt
                )
            if path is not None and trainer.engine.context_rank == 0:
                write_video(path, video_FHWC.numpy(), self.options.fps)

    def _text(self, trainer: Trainer, key: str) -> Mapping[str, torch.Tensor]:
        entry = {name: tensor[None].to(trainer.device) for name, tensor in self.cache.read("texts", key).items()}
        return trainer.method.embed(trainer.models, entry)


def given_images(item: Item | None, condition: Condition) -> dict[str, Any]:
    """The frames that a condition gives of an item, as `Family.render` takes them."""
    if item is None or condition.is_none:
        return {}
    frames = read_clip(item.record, item.media, item.window, item.bucket).video_FCHW.permute(0, 2, 3, 1).numpy()
    first = [Image.fromarray(frame) for frame in frames[: condition.num_first]]
    images: dict[str, Any] = {"image": first[0] if len(first) == 1 else first}
    return images | ({"last_image": Image.fromarray(frames[-1])} if condition.num_last else {})


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
        # What is on disk the main process knows.
        is_done = trainer.engine.gather(trainer.engine.is_main and self._is_done(trainer.state.step))[0]
        if self._is_due(trainer.state.step) and not is_done:
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
        trainer.set_training(False)
        metrics, videos = {}, {}
        advice = ("memory.vae_tiling=true", "a smaller validation.bucket", "validation.num_videos=0")
        with torch.no_grad(), told("validation", trainer.device, advice=advice, held=trainer.held):
            if self.held_out is not None:
                metrics["validation_loss"] = self.held_out.measure(trainer)
                logger.info("step %d: validation loss %.5f", trainer.state.step, metrics["validation_loss"])
            if self.videos is not None:
                videos = self.videos.render(trainer)
        trainer.set_training(True)
        for callback in trainer.callbacks:
            callback.on_validation(trainer, metrics, videos)
