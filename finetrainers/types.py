"""The nouns of a run, in the order in which they come to be, from Record to Batch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetrainers.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

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
class Condition:
    """Which frames of a clip the model is given: so many at its beginning, so many at its end."""

    num_first: int = 0
    num_last: int = 0

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `none`, `first`, `first_last` or `prefix-N`. Raises UserError for anything else."""
        named = {"none": cls(), "first": cls(1), "first_last": cls(1, 1)}
        if text in named:
            return named[text]
        # Not prefix-1, which is `first`: of two names for one condition in a mapping, a share would be lost.
        if match := re.fullmatch(r"prefix-([2-9]|[1-9]\d{1,4})", text):
            return cls(int(match[1]))
        raise UserError(
            f"condition {text!r} is none of `none`, `first`, `first_last` and `prefix-N` (N frames from 2 up)"
        )

    @property
    def is_none(self) -> bool:
        return self == Condition()

    def __str__(self) -> str:
        if self.num_last:
            return "first_last"
        return {0: "none", 1: "first"}.get(self.num_first, f"prefix-{self.num_first}")


@dataclass(frozen=True)
class TokenCount:
    """What a tokenizer made of one caption."""

    num_tokens: int
    """Before it is cut."""
    num_unknown: int
    """Tokens that stand for text the tokenizer does not know."""
    unknown_share: float
    """Of the caption's characters; a single unknown token may stand for a whole sentence."""
    limit: int
    """Tokens that the model reads; what is beyond is cut off."""


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
    empty_text_key: str
    """Of the caption that is shown when the sample's own is dropped."""
    condition_keys: dict[str, str]
    """By condition, where something must be encoded for it."""
    caption: str
    bucket: Bucket
    fps: float
    """Frames per second that the latents stand for."""
    num_tokens: int
    """Length of the transformer's video sequence."""


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket, drawn and ready for a step: clean latents, noise and noise level, text and given frames.

    All tensors but `fps_B` are fp32, and those that an encoder made, which have its own type.
    """

    latents_BCFHW: Tensor
    noise_BCFHW: Tensor
    level_B: Tensor
    """Noise level of each sample in [0, 1]."""
    text: dict[str, Tensor]
    """What the family's text encoder gave, batched: for LTX `prompt_embeds` [B, L, D] and `prompt_attention_mask`; or,
    when it is being trained, the tokens that it takes."""
    given: dict[str, Tensor]
    """What the family makes of the frames that the model is given, batched; `frames` [B, F] marks latent frames that
    are given clean and are not to be learned."""
    fps_B: Tensor
    """Frames per second of each sample, fp64, so that a model is told them as precisely as its pipeline tells it."""
    names: tuple[str, ...]
    num_tokens: int
    """Video tokens of the whole batch."""

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that depends on their names alone."""
        found: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(see)
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed, say moved."""
        return replace(
            self,
            latents_BCFHW=change(self.latents_BCFHW),
            noise_BCFHW=change(self.noise_BCFHW),
            level_B=change(self.level_B),
            text={name: change(tensor) for name, tensor in self.text.items()},
            given={name: change(tensor) for name, tensor in self.given.items()},
            fps_B=change(self.fps_B),
        )
