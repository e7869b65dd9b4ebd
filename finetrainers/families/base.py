"""The contract of a model family: what a model says about itself. Training never asks which family it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetrainers.hashing import folder_digest
from finetrainers.types import Bucket

# Shape suffixes: B batch, C channels, F frames, H height, W width, L text tokens, D features.


@dataclass(frozen=True)
class SamplingOptions:
    """How a video is rendered."""

    num_inference_steps: int
    guidance_scale: float | None
    """None takes the family's own."""
    fps: float
    seed: int


class Family(ABC):
    """One model family, opened on a model folder. Latents are `BCFHW` everywhere outside a family; packing, rotary
    coordinates, masks and whatever else its transformer wants lives inside `predict`."""

    name: ClassVar[str]
    """As shown by `finetrainers models`."""
    variants: ClassVar[str]
    """The published models that belong to it, in words."""
    pipelines: ClassVar[tuple[str, ...]]
    """Class names in `model_index.json` by which it is recognised."""
    tasks: ClassVar[tuple[str, ...]]
    parts: ClassVar[dict[str, str]]
    """Role -> subfolder, for the roles `video_encoder`, `text_encoder`, `tokenizer`, `transformer`."""
    default_fps: ClassVar[float]
    """Frame rate of sample videos where the clips do not say."""

    def __init__(self, folder: Path, *, vae_tiling: bool = False) -> None:
        self.folder = folder
        self.vae_tiling = vae_tiling

    @abstractmethod
    def defaults(self, method: str) -> dict[str, Any]:
        """The best known value, by `section.key`, of each option whose default only the family knows."""

    @abstractmethod
    def check_bucket(self, bucket: Bucket) -> str | None:
        """None if the model can take the size; otherwise why not and what it can take."""

    @abstractmethod
    def num_tokens(self, bucket: Bucket) -> int:
        """Length of the transformer's video sequence for a clip of this size."""

    @abstractmethod
    def build_transformer(self) -> torch.nn.Module:
        """The transformer as its config describes it, with no weights read; meant for the meta device."""

    @abstractmethod
    def load_transformer(self, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer with its weights, on the CPU."""

    @abstractmethod
    def load_video_encoder(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The VAE, ready to encode and to decode."""

    @abstractmethod
    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Text encoders and tokenizers by name."""

    @abstractmethod
    def encode_video(self, vae: Any, video_FCHW: Tensor) -> dict[str, Tensor]:
        """A clip (uint8, RGB) as the posterior of its latents: `mean` and `logvar` [C, F, H, W] in the VAE's dtype, and
        `shift` and `scale` [C] (fp32) by which a draw is normalised: `(draw - shift) * scale`."""

    @abstractmethod
    def encode_text(self, encoders: dict[str, Any], captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """For each caption, what the transformer is given for it, without the batch dimension."""

    @abstractmethod
    def count_text_tokens(self, encoders: dict[str, Any], captions: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each caption before it is cut, and the length at which it is cut."""

    @abstractmethod
    def predict(
        self,
        transformer: torch.nn.Module,
        latents_BCFHW: Tensor,
        timestep_B: Tensor,
        *,
        text: dict[str, Tensor],
        fps: Sequence[float],
    ) -> Tensor:
        """The transformer's answer, fp32, in the shape of the latents; called exactly as the pipeline calls it."""

    @abstractmethod
    def pipeline(self, **parts: Any) -> Any:
        """The diffusers pipeline around the given parts, with a fresh scheduler; parts left out are None."""

    @abstractmethod
    def load_pipeline(self, dtype: torch.dtype) -> Any:
        """The whole diffusers pipeline from the model folder, on the CPU."""

    @abstractmethod
    def render(self, pipeline: Any, bucket: Bucket, options: SamplingOptions, **prompt: Any) -> Tensor:
        """Run the pipeline: one video, uint8 FHWC, on the CPU. `prompt` holds `prompt` and `negative_prompt`, or what
        `prompt_arguments` made of encoded text."""

    @abstractmethod
    def prompt_arguments(self, text: dict[str, Tensor], negative: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encoded texts (without batch dimension) as the pipeline's call takes them."""

    def fingerprint(self, role: str) -> str:
        """Digest of the files of one part; what was made with it is stale when this changes."""
        return folder_digest(self.folder / self.parts[role])
