"""LTX-Video, 2B and 13B, 0.9.0 to 0.9.8: text to video."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetrainers.errors import UserError
from finetrainers.families.base import Family, SamplingOptions
from finetrainers.types import Bucket

# Shape suffixes: B batch, C channels, F frames, H height, W width, S video tokens, L text tokens, D features.

FRAMES, SPACE = 8, 32
"""Pixels of a latent in time and in space; the transformer's patch is one latent."""
GUIDANCE_SCALE = 3.0
TARGETS = r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


class LTXVideo(Family):
    """From 0.9.5 on (told by the VAE's blocks) latents have causal time coordinates and prompts 256 tokens, and the
    pipeline is LTXConditionPipeline; before, LTXPipeline."""

    name = "ltx"
    variants = "LTX-Video 2B and 13B, 0.9.0 to 0.9.8"
    pipelines = ("LTXPipeline", "LTXConditionPipeline", "LTXImageToVideoPipeline")
    tasks = ("text-to-video",)
    parts = {  # noqa: RUF012 - a constant of the class
        "video_encoder": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
        "transformer": "transformer",
    }
    default_fps = 25.0

    @cached_property
    def is_causal(self) -> bool:
        """Whether the first latent stands for one frame in time as well (0.9.5 and later)."""
        config = json.loads((self.folder / "vae" / "config.json").read_text())
        return "LTXVideo095DownBlock3D" in (config.get("down_block_types") or ())

    @property
    def max_text_tokens(self) -> int:
        return 256 if self.is_causal else 128

    def defaults(self, method: str) -> dict[str, Any]:
        return {
            "data.buckets": ["49x512x768"],
            "method.target_modules": TARGETS,
            "objective.timestep_sampling": "shifted_logit_normal",
            "optimizer.lr": 2e-4 if method == "lora" else 1e-5,
            "validation.guidance_scale": GUIDANCE_SCALE,
        }

    def check_bucket(self, bucket: Bucket) -> str | None:
        frames_fit = bucket.num_frames % FRAMES == 1
        if frames_fit and bucket.height % SPACE == 0 and bucket.width % SPACE == 0:
            return None
        frames = bucket.num_frames if frames_fit else max(round((bucket.num_frames - 1) / FRAMES), 0) * FRAMES + 1
        height, width = (max(round(size / SPACE), 1) * SPACE for size in (bucket.height, bucket.width))
        return (
            f"LTX-Video takes 8k+1 frames (1, 9, 17, 25, ...) and a height and width that are multiples of 32; "
            f"the nearest is {Bucket(frames, height, width)}"
        )

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return (bucket.num_frames - 1) // FRAMES + 1, bucket.height // SPACE, bucket.width // SPACE

    def num_tokens(self, bucket: Bucket) -> int:
        frames, height, width = self.latent_shape(bucket)
        return frames * height * width

    def build_transformer(self) -> torch.nn.Module:
        from diffusers import LTXVideoTransformer3DModel

        config = LTXVideoTransformer3DModel.load_config(self.folder / "transformer")
        return LTXVideoTransformer3DModel.from_config(config)

    def load_transformer(self, dtype: torch.dtype) -> torch.nn.Module:
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel.from_pretrained(
            self.folder, subfolder="transformer", dtype=dtype, use_safetensors=True
        )

    def load_video_encoder(self, device: torch.device, dtype: torch.dtype) -> Any:
        from diffusers import AutoencoderKLLTXVideo

        vae = AutoencoderKLLTXVideo.from_pretrained(self.folder, subfolder="vae", dtype=dtype, use_safetensors=True)
        vae.requires_grad_(False).eval().to(device)
        if self.vae_tiling:
            vae.enable_tiling()
            # Encoding looks at the flag for decoding (diffusers 0.42), so both are set.
            vae.use_framewise_encoding = vae.use_framewise_decoding = True
        return vae

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        from transformers import AutoTokenizer, T5EncoderModel

        encoder = T5EncoderModel.from_pretrained(
            self.folder, subfolder="text_encoder", dtype=dtype, use_safetensors=True
        )
        encoder.requires_grad_(False).eval().to(device)
        return {"text_encoder": encoder, "tokenizer": AutoTokenizer.from_pretrained(self.folder / "tokenizer")}

    @torch.no_grad()
    def encode_video(self, vae: Any, video_FCHW: Tensor) -> dict[str, Tensor]:
        pixels = video_FCHW.to(vae.device).permute(1, 0, 2, 3)[None].to(vae.dtype) / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        return {
            "mean": posterior.mean[0],
            "logvar": posterior.logvar[0],
            "shift": vae.latents_mean.float(),
            "scale": vae.config.scaling_factor / vae.latents_std.float(),
        }

    @torch.no_grad()
    def encode_text(self, encoders: dict[str, Any], captions: Sequence[str]) -> list[dict[str, Tensor]]:
        tokens = encoders["tokenizer"](
            list(captions),
            padding="max_length",
            max_length=self.max_text_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        encoder = encoders["text_encoder"]
        # LTXPipeline lets the encoder attend to the padding, LTXConditionPipeline does not; each model learned its own.
        mask = {"attention_mask": tokens.attention_mask.to(encoder.device)} if self.is_causal else {}
        embeds_BLD = encoder(tokens.input_ids.to(encoder.device), **mask)[0]
        masks_BL = tokens.attention_mask.bool()
        return [
            {"prompt_embeds": embeds, "prompt_attention_mask": mask}
            for embeds, mask in zip(embeds_BLD, masks_BL, strict=True)
        ]

    def count_text_tokens(self, encoders: dict[str, Any], captions: Sequence[str]) -> tuple[list[int], int]:
        # verbose=False: transformers would warn of indexing errors, though nothing longer is given to the encoder.
        tokens = encoders["tokenizer"](list(captions), verbose=False)
        return [len(ids) for ids in tokens.input_ids], self.max_text_tokens

    def predict(
        self,
        transformer: Any,
        latents_BCFHW: Tensor,
        timestep_B: Tensor,
        *,
        text: dict[str, Tensor],
        fps: Sequence[float],
    ) -> Tensor:
        frames, height, width = latents_BCFHW.shape[2:]
        packed_BSC = latents_BCFHW.flatten(2).transpose(1, 2).to(transformer.dtype)
        if self.is_causal:
            timestep_B = timestep_B[:, None]
            positions: dict[str, Any] = {
                "video_coords": _causal_coordinates(frames, height, width, fps, latents_BCFHW.device)
            }
        else:
            positions = {"num_frames": frames, "height": height, "width": width}
            positions["rope_interpolation_scale"] = (_seconds(fps, latents_BCFHW.device), SPACE, SPACE)
        answer_BSC = transformer(
            hidden_states=packed_BSC,
            encoder_hidden_states=text["prompt_embeds"].to(transformer.dtype),
            timestep=timestep_B,
            encoder_attention_mask=text["prompt_attention_mask"],
            return_dict=False,
            **positions,
        )[0]
        return answer_BSC.float().transpose(1, 2).unflatten(2, (frames, height, width))

    def pipeline(self, **parts: Any) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline, LTXPipeline

        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")
        kind = LTXConditionPipeline if self.is_causal else LTXPipeline
        given = {name: parts.get(name) for name in ("vae", "text_encoder", "tokenizer", "transformer")}
        return kind(scheduler=scheduler, **given)

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        from diffusers import LTXConditionPipeline, LTXPipeline

        kind = LTXConditionPipeline if self.is_causal else LTXPipeline
        pipeline = kind.from_pretrained(self.folder, dtype=dtype, use_safetensors=True)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        return pipeline

    def render(self, pipeline: Any, bucket: Bucket, options: SamplingOptions, **prompt: Any) -> Tensor:
        if options.num_inference_steps == 1 and pipeline.scheduler.config.get("shift_terminal"):
            raise UserError(
                "this model needs at least 2 denoising steps: its noise schedule stretches from first to last"
            )
        guidance = GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale
        frames_FCHW = pipeline(
            height=bucket.height,
            width=bucket.width,
            num_frames=bucket.num_frames,
            frame_rate=options.fps,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=guidance,
            # 0.9.1 and later decode with a little noise; 0.9.0 ignores both.
            decode_timestep=0.05,
            decode_noise_scale=0.025,
            max_sequence_length=self.max_text_tokens,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **prompt,
        ).frames[0]
        return (frames_FCHW.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def prompt_arguments(self, text: dict[str, Tensor], negative: dict[str, Tensor]) -> dict[str, Tensor]:
        batched = {name: tensor[None] for name, tensor in text.items()}
        return batched | {f"negative_{name}": tensor[None] for name, tensor in negative.items()}


def _seconds(fps: Sequence[float], device: torch.device) -> float | Tensor:
    """Seconds between latents: a number where the batch agrees, as the pipeline passes it, else one a sample."""
    if len(set(fps)) == 1:
        return FRAMES / fps[0]
    return torch.tensor([FRAMES / rate for rate in fps], device=device).view(-1, 1, 1, 1, 1)


def _causal_coordinates(frames: int, height: int, width: int, fps: Sequence[float], device: torch.device) -> Tensor:
    """Start of each latent in seconds and pixels, [B, 3, S]: latent f begins at pixel frame max(8f - 7, 0)."""
    axes = (
        (torch.arange(frames, device=device) * FRAMES + 1 - FRAMES).clamp(min=0),
        torch.arange(height, device=device) * SPACE,
        torch.arange(width, device=device) * SPACE,
    )
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).float()
    coordinates = grid.repeat(len(fps), 1, 1)
    coordinates[:, 0] *= torch.tensor([1.0 / rate for rate in fps], device=device)[:, None]
    return coordinates
