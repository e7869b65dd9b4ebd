"""Which of the Wan models a folder holds, told by its configs and never by its name, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from finetrainers.families.parts import refuse_bucket
from finetrainers.families.rope import position_scale, temporal_frequencies
from finetrainers.types import Bucket, Condition

ROPE_BASE = 10_000.0


# Wan's report (arXiv 2503.20314, 4.2.2) trains on a logit-normal. Under A14B's shift of 12 it would leave the expert of
# little noise 2 % of its draws below 0.5; a uniform law, as of sampling, leaves 21 %.
SINGLE_LAW, PAIR_LAW = "logit_normal", "uniform"
LAWS: dict[str, dict[str, Any]] = {
    "2.1 at 480p": {"timestep_sampling": SINGLE_LAW, "shift": 3.0},
    "2.1 at 720p, 2.2 TI2V-5B": {"timestep_sampling": SINGLE_LAW, "shift": 5.0},
    "2.2 T2V-A14B": {"timestep_sampling": PAIR_LAW, "shift": 12.0},
    "2.2 I2V-A14B": {"timestep_sampling": PAIR_LAW, "shift": 5.0},
}


@dataclass(frozen=True)
class Variant:
    """The facts in which Wan models differ."""

    boundary: float | None
    """Noise level from which on the expert for much noise answers; None for a model of one transformer."""
    expands_timesteps: bool
    """Whether each token has its own timestep, so that a given frame is put in clean (2.2 TI2V-5B)."""
    latent_channels: int
    in_channels: int
    has_image_attention: bool
    """Whether the transformer attends to CLIP's view of given frames (2.1 image-to-video)."""
    takes_two_images: bool
    """Whether it has positions for CLIP's view of two frames (2.1 FLF2V), which fit no single one."""
    text_dim: int
    max_positions: int
    """Rotary positions of an axis."""
    patch: tuple[int, int, int]
    """Latents of a token, in time, height and width."""
    frames: int
    """Pixel frames of a latent."""
    space: int
    """Pixels of a latent, in height and width."""

    @classmethod
    def read(cls, index: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Variant:
        """From a folder's model_index.json and two configs. They may be older than a key; what is missing then is
        diffusers' default."""
        # Some repositories of one transformer name a boundary all the same.
        has_experts = (index.get("transformer_2") or [None])[0] is not None
        return cls(
            boundary=index.get("boundary_ratio") if has_experts else None,
            expands_timesteps=bool(index.get("expand_timesteps", False)),
            latent_channels=vae.get("z_dim", 16),
            in_channels=transformer.get("in_channels", 16),
            has_image_attention=transformer.get("image_dim") is not None,
            takes_two_images=transformer.get("pos_embed_seq_len") is not None,
            text_dim=transformer.get("text_dim", 4096),
            max_positions=transformer.get("rope_max_seq_len", 1024),
            patch=tuple(transformer.get("patch_size", (1, 2, 2))),
            frames=vae.get("scale_factor_temporal", 4),
            space=vae.get("scale_factor_spatial", 8),
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model does; the first is what it is for."""
        if self.in_channels > self.latent_channels:
            return (IMAGE_TO_VIDEO,)
        return (TEXT_TO_VIDEO, IMAGE_TO_VIDEO) if self.expands_timesteps else (TEXT_TO_VIDEO,)

    def conditions(self, task: str) -> tuple[str, ...]:
        """Names of the conditions that can be trained; the first is the default."""
        if task == TEXT_TO_VIDEO:
            return ("none",)
        if self.expands_timesteps:
            return "first", "none"
        if self.has_image_attention:
            return ("first_last",) if self.takes_two_images else ("first",)
        return "first", "first_last"

    def guidance_scales(self, task: str) -> tuple[float, float | None]:
        """Of the transformer, and of the expert for little noise where there is one."""
        if self.boundary is None:
            return 5.0, None
        return (4.0, 3.0) if task == TEXT_TO_VIDEO else (3.5, 3.5)

    @property
    def native_bucket(self) -> Bucket:
        """The size and length that the model is made for."""
        return Bucket(121, 704, 1280) if self.expands_timesteps else Bucket(81, 480, 832)

    @property
    def default_fps(self) -> float:
        """Frame rate of what the model makes."""
        return 24.0 if self.expands_timesteps else 16.0

    def check_channels(self) -> str | None:
        """None if the transformer takes latents, or latents with a mask and given frames; otherwise what it takes."""
        supported = (self.latent_channels, 2 * self.latent_channels + self.frames)
        if self.in_channels in supported:
            return None
        return (
            f"its transformer takes {self.in_channels} channels; supported are {supported[0]} (text-to-video) and "
            f"{supported[1]} (image-to-video)"
        )

    def check_bucket(self, bucket: Bucket) -> str | None:
        """None if a clip of this size has whole tokens and few enough; otherwise why not and what can be."""
        space, longest = self.space * self.patch[1], self.max_positions
        if bucket.num_frames > self.num_frames(longest) or max(bucket.height, bucket.width) > longest * space:
            most = Bucket(self.num_frames(longest), longest * space, longest * space)
            return f"Wan has {longest} positions for an axis, which is {most} at most"
        return refuse_bucket(bucket, frames=self.frames, space=space, name="Wan")

    def check_condition(self, condition: Condition, bucket: Bucket, task: str) -> str | None:
        """None if a clip of this size can be trained with these frames given; otherwise why not and what can be."""
        allowed = self.conditions(task)
        if str(condition) not in allowed:
            if task == TEXT_TO_VIDEO:
                mend = "set model.task to image-to-video" if self.expands_timesteps else "leave data.conditions out"
                return f"this model is given no frames in text-to-video; {mend}"
            always = "" if "none" in allowed else "; the shares of data.conditions must add up to 1"
            return f"this model is given {' or '.join(allowed)}, not {condition}{always}"
        if not condition.is_none and bucket.num_frames == 1:
            return "an image has nothing left to learn when its one frame is given; give image-to-video clips"
        return None

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a clip."""
        return self.num_latents(bucket.num_frames), bucket.height // self.space, bucket.width // self.space

    def num_tokens(self, bucket: Bucket) -> int:
        """Length of the transformer's video sequence for a clip of this size."""
        shape = self.latent_shape(bucket)
        return math.prod(size // patch for size, patch in zip(shape, self.patch, strict=True))

    def num_latents(self, num_frames: int) -> int:
        """Latent frames of so many pixel frames."""
        return (num_frames - 1) // self.frames + 1

    def num_frames(self, num_latents: int) -> int:
        """Pixel frames of so many latent frames."""
        return (num_latents - 1) * self.frames + 1

    def stretch_time(self, transformer: Any, options: Any) -> None:
        """Write the positions in time that `model.rope_temporal` asks for, if anything, into a transformer's table of
        them, which is no part of its weights."""
        if options is None:
            return
        trained = self.num_latents(self.native_bucket.num_frames)
        length = {"trained": trained, "wanted": self.num_latents(options.frames), "method": options.method}
        rope = transformer.rope
        positions = torch.arange(rope.max_seq_len, dtype=torch.float64) * position_scale(**length)
        angles = torch.outer(positions, temporal_frequencies(rope.t_dim, ROPE_BASE, **length))
        rope.freqs_cos[:, : rope.t_dim] = angles.cos().repeat_interleave(2, dim=1)
        rope.freqs_sin[:, : rope.t_dim] = angles.sin().repeat_interleave(2, dim=1)


def shift_of(scheduler: Any) -> float:
    """Shift of a noise schedule: UniPC, which the models are published with, and Euler name it differently."""
    config = scheduler.config
    return float(config["flow_shift"] if "flow_shift" in config else config["shift"])
