"""What Wan is given of a clip, as its pipelines make it: given frames, their mask, CLIP's view, timesteps of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetrainers.families.parts import load_encoder
from finetrainers.types import Condition

# Shape suffixes: B batch, C channels, F frames, H height, W width, S video tokens, N images, L tokens, D features.


def normalisation(vae: Any) -> tuple[Tensor, Tensor]:
    """Shift and scale by which latents are normalised, `(latents - shift) * scale`, each [C] in fp32."""
    numbers = (vae.config.latents_mean, vae.config.latents_std)
    shift, deviation = (torch.tensor(values, dtype=torch.float32, device=vae.device) for values in numbers)
    return shift, 1.0 / deviation


def only_given(pixels_BCFHW: Tensor, condition: Condition) -> Tensor:
    """A clip with its given frames where they are and zeros, a middle grey, for all others."""
    clip_BCFHW = torch.zeros_like(pixels_BCFHW)
    clip_BCFHW[:, :, : condition.num_first] = pixels_BCFHW[:, :, : condition.num_first]
    last = slice(pixels_BCFHW.shape[2] - condition.num_last, None)
    clip_BCFHW[:, :, last] = pixels_BCFHW[:, :, last]
    return clip_BCFHW


def given_mask(condition: Condition, latents_CFHW: Tensor, frames_per_latent: int) -> Tensor:
    """1 where a pixel frame is given, [frames_per_latent, F, H, W]: a channel for each frame of a latent. The first
    latent holds one frame, which stands for all of its channels."""
    num_latents, height, width = latents_CFHW.shape[1:]
    num_frames = (num_latents - 1) * frames_per_latent + 1
    index = torch.arange(num_frames, device=latents_CFHW.device)
    is_given = (index < condition.num_first) | (index >= num_frames - condition.num_last)
    is_given = torch.cat([is_given[:1].expand(frames_per_latent), is_given[1:]])
    mask = is_given.view(num_latents, frames_per_latent).T[:, :, None, None]
    return mask.expand(-1, -1, height, width).to(latents_CFHW.dtype)


def load_clip(folder: Path, device: torch.device) -> dict[str, Any]:
    """CLIP's image encoder, in fp32, and what prepares images for it."""
    from transformers import CLIPImageProcessor

    return {
        "image_encoder": load_encoder("CLIPVisionModel", folder, "image_encoder", device, torch.float32),
        "image_processor": CLIPImageProcessor.from_pretrained(folder / "image_processor"),
    }


def look_at(encoders: Mapping[str, Any], video_FCHW: Tensor, condition: Condition) -> Tensor:
    """What CLIP makes of the first and of the last given frame, from its last layer but one: [N, L, D]."""
    from PIL import Image

    ends = [video_FCHW[0], *([video_FCHW[-1]] if condition.num_last else [])]
    images = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in ends]
    encoder = encoders["image_encoder"]
    pixels = encoders["image_processor"](images=images, return_tensors="pt").to(encoder.device)
    hidden: Tensor = encoder(**pixels, output_hidden_states=True).hidden_states[-2]
    return hidden


def blank_look(folder: Path, condition: Condition) -> Tensor:
    """Zeros of the shape that `look_at` gives."""
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig.from_pretrained(folder / "image_encoder")
    num_patches = (config.image_size // config.patch_size) ** 2
    return torch.zeros(condition.num_first + condition.num_last, num_patches + 1, config.hidden_size)


def token_timesteps(
    timestep_B: Tensor, latents_BCFHW: Tensor, given: Mapping[str, Tensor], patch: tuple[int, int, int]
) -> Tensor:
    """A timestep for each token [B, S], which is 0 in latent frames that are given clean."""
    num_latents, height, width = latents_BCFHW.shape[2:]
    timestep_BF = timestep_B[:, None].expand(-1, num_latents)
    if "frames" in given:
        timestep_BF = timestep_BF * ~given["frames"]
    return timestep_BF.repeat_interleave((height // patch[1]) * (width // patch[2]), dim=1)
