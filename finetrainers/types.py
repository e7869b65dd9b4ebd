"""The nouns of a run, in the order in which they come to be: Record, Bucket, Media, Window, Clip, Sample, Batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetrainers.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Shape suffixes: B batch, C channels, F frames (pixel or latent), H height, W width, L text tokens, D text features.


@dataclass(frozen=True)
class Record:
    """One clip or image as its source lists it: a file and its caption."""

    name: str
    """How messages name it: its path relative to the source."""
    path: Path
    caption: str


@dataclass(frozen=True, order=True)
class Bucket:
    """One size that clips are brought to: frames x height x width, in pixels."""

    num_frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Read `49x512x768`. Raises UserError when it is not three positive whole numbers."""
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})x(\d{1,5})\s*", text)
        if not match or 0 in (sizes := [int(size) for size in match.groups()]):
            raise UserError(f"bucket {text!r} is not FRAMESxHEIGHTxWIDTH in positive whole numbers, such as 49x512x768")
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Media:
    """What a file's header says of its picture stream, seen as a viewer sees it (rotation applied)."""

    width: int
    height: int
    num_frames: int
    """1 for an image; estimated from duration and rate where the container does not count its frames."""
    fps: float
    """Average frames per second; 0.0 for an image."""
    duration_seconds: float
    """0.0 for an image."""

    @property
    def is_image(self) -> bool:
        return self.fps == 0.0


@dataclass(frozen=True)
class Window:
    """Which part of a clip becomes a sample, and at which rate it is read."""

    start_seconds: float
    num_frames: int
    fps: float
    """Rate at which frames are picked, and what the model is told; 0.0 for an image."""


@dataclass(frozen=True)
class Clip:
    """The pixels of one window, resized and cropped to its bucket."""

    video_FCHW: Tensor
    """uint8, RGB."""
    fps: float


@dataclass(frozen=True)
class Problem:
    """A clip that could not be used, and why. It is named and counted, never dropped in silence."""

    name: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One encoded training example: where its latents and its text lie in the cache."""

    name: str
    video_key: str
    text_key: str
    caption: str
    bucket: Bucket
    fps: float
    """Frames per second that the latents stand for."""
    num_tokens: int
    """Length of the transformer's video sequence."""


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket, drawn and ready for a step: clean latents, noise and noise level, and the conditions.

    All tensors are fp32 but for the text, which has the text encoder's own type.
    """

    latents_BCFHW: Tensor
    noise_BCFHW: Tensor
    sigma_B: Tensor
    """Noise level of each sample in (0, 1)."""
    text: dict[str, Tensor]
    """What the family's text encoder gave, batched: for LTX `prompt_embeds` [B, L, D] and `prompt_attention_mask`."""
    fps: tuple[float, ...]
    """Kept as numbers, so that reading them never waits for the device."""
    names: tuple[str, ...]
    num_tokens: int
    """Video tokens of the whole batch."""

    @property
    def size(self) -> int:
        return len(self.names)
