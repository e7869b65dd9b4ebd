"""LTX-Video, 2B and 13B, 0.9.0 to 0.9.8: text to video, and frames given at the beginning and the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from math import lcm
from typing import Any

import torch
from torch import Tensor

from finetrainers.errors import UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Family, SamplingOptions
from finetrainers.families.ltx_positions import causal_grid, in_seconds, seconds_between
from finetrainers.families.parts import (
    build_network,
    count_tokens,
    dtype_of,
    frames_out,
    load_encoder,
    load_network,
    load_vae,
    pad_tokens,
    put_given,
    refuse_bucket,
    to_pixels,
)
from finetrainers.latents import draw_latents
from finetrainers.types import Bucket, Condition, TokenCount

# Shape suffixes: B batch, C channels, F frames, H height, W width, S video tokens, L text tokens, D features.

LONGEST = 257
"""Frames of the longest clips that the model is published for."""
GUIDANCE_SCALE = 3.0
TARGETS = r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


class LTXVideo(Family):
    """From 0.9.5 on (told by the VAE's blocks) latents have causal time coordinates and prompts 256 tokens, and the
    pipeline is LTXConditionPipeline; before, LTXPipeline and LTXImageToVideoPipeline."""

    name = "ltx"
    variants = "LTX-Video 2B and 13B, 0.9.0 to 0.9.8"
    pipelines = ("LTXPipeline", "LTXConditionPipeline", "LTXImageToVideoPipeline")
    tasks = (TEXT_TO_VIDEO, IMAGE_TO_VIDEO)
    laws = {"all": {"timestep_sampling": "shifted_logit_normal", "shift": 1.0}}  # noqa: RUF012 - a constant of the class
    lengths = (1024, 2688, 4096)
    takes = frozenset({"rope_temporal"})
    parts = {  # noqa: RUF012 - a constant of the class
        "video_encoder": ("vae",),
        "text_encoder": ("text_encoder", "tokenizer"),
        "transformer": ("transformer",),
    }
    default_fps = 25.0
    longest = LONGEST
    text_encoder_targets = r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkvo]"

    @cached_property
    def is_causal(self) -> bool:
        """Whether the first latent stands for one frame in time as well (0.9.5 and later)."""
        return "LTXVideo095DownBlock3D" in (self.config("vae").get("down_block_types") or ())

    @cached_property
    def strides(self) -> tuple[int, int]:
        """Frames, and pixels of a side, that one latent stands for, as diffusers reads the VAE's config."""
        vae = self.config("vae")
        halved = 2 ** sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
        frames = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * halved
        return frames, vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * halved

    @property
    def max_text_tokens(self) -> int:
        return 256 if self.is_causal else 128

    @property
    def latent_channels(self) -> int:
        return int(self.config("transformer").get("in_channels", 128))

    def defaults(self, method: str) -> dict[str, Any]:
        return {
            "model.task": self.task,
            "data.buckets": ["49x512x768"],
            # Half with the first frame, half without: one model for both, as Lightricks' trainer does it.
            "data.conditions": {"first": 0.5} if self.task == IMAGE_TO_VIDEO else {},
            "method.target_modules": TARGETS,
            **{f"objective.{key}": value for key, value in self.laws["all"].items()},
            "optimizer.lr": 2e-4 if method == "lora" else 1e-5,
            "validation.guidance_scale": GUIDANCE_SCALE,
        }

    def check_options(self) -> str | None:
        rope = self.options.rope_temporal
        if rope is None or rope.method == "interpolate":
            return None
        return f"model.rope_temporal.method {rope.method} is not for LTX-Video, whose positions are seconds"

    def check_bucket(self, bucket: Bucket) -> str | None:
        frames, space = self.strides
        # The pipelines take sides of 32 pixels and their multiples, whatever the VAE is.
        return refuse_bucket(bucket, frames=frames, space=lcm(space, 32), name="LTX-Video")

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        frames, space = self.strides
        return (bucket.num_frames - 1) // frames + 1, bucket.height // space, bucket.width // space

    def num_tokens(self, bucket: Bucket) -> int:
        frames, height, width = self.latent_shape(bucket)
        return frames * height * width

    def sequence_length(self, bucket: Bucket, condition: Condition) -> int:
        # The last frame is more tokens, in front of the clip's.
        return self.num_tokens(bucket) + (self.num_tokens(replace(bucket, num_frames=1)) if condition.num_last else 0)

    @classmethod
    def context_plan(cls) -> dict[str, Any]:
        from diffusers import LTXVideoTransformer3DModel

        # Theirs splits the text as well, and so asks that its length divides.
        plan: dict[str, Any] = dict(LTXVideoTransformer3DModel._cp_plan)
        return {**plan, "": {"hidden_states": plan[""]["hidden_states"]}}

    def build_transformers(self) -> dict[str, torch.nn.Module]:
        return {"transformer": build_network("LTXVideoTransformer3DModel", self.folder, "transformer")}

    def load_transformers(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        return {"transformer": load_network("LTXVideoTransformer3DModel", self.folder, "transformer", dtype)}

    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        vae = load_vae("AutoencoderKLLTXVideo", self.folder, device, dtype, tiling=self.vae_tiling)
        if self.vae_tiling:
            # Encoding looks at the flag for decoding (diffusers 0.42), so both are set.
            vae.use_framewise_encoding = vae.use_framewise_decoding = True
        return {"vae": vae}

    @torch.no_grad()
    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: Tensor) -> dict[str, Tensor]:
        vae = encoders["vae"]
        posterior = vae.encode(to_pixels(video_FCHW, vae)).latent_dist
        return {
            "mean": posterior.mean[0],
            "logvar": posterior.logvar[0],
            "shift": vae.latents_mean.float(),
            "scale": vae.config.scaling_factor / vae.latents_std.float(),
        }

    def check_condition(self, condition: Condition, bucket: Bucket) -> str | None:
        if condition.is_none:
            return None
        if self.task == TEXT_TO_VIDEO:
            return "frames are given in image-to-video; set model.task to it"
        if not self.is_causal and condition != Condition(1):
            return "LTX-Video before 0.9.5 is given the first frame or none"
        frames = self.strides[0]
        if condition.num_first % frames != 1:
            lengths = f"{frames}k+1 frames (1, {frames + 1}, {2 * frames + 1}, ...)"
            return f"LTX-Video is given {lengths} of a clip's beginning, not {condition.num_first}"
        if condition.num_first + condition.num_last >= bucket.num_frames:
            return f"a clip of {bucket.num_frames} frames has nothing left to learn"
        return None

    def needs_encoding(self, condition: Condition) -> bool:
        # The VAE is causal: what it makes of a clip's beginning is the beginning of what it makes of the clip.
        return condition.num_last > 0

    def encode_condition(
        self, encoders: Mapping[str, Any], video_FCHW: Tensor, condition: Condition, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return self.encode_video(encoders, video_FCHW[-1:])

    def blank_condition(self, bucket: Bucket, condition: Condition) -> dict[str, Tensor]:
        if not condition.num_last:
            return {}
        channels = self.latent_channels
        moments = torch.zeros(channels, 1, *self.latent_shape(bucket)[1:])
        return {"mean": moments, "logvar": moments, "shift": torch.zeros(channels), "scale": torch.ones(channels)}

    def given(
        self,
        condition: Condition,
        latents_CFHW: Tensor,
        encoded: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        if condition.is_none:
            return {}
        num_first = (condition.num_first - 1) // self.strides[0] + 1
        frames = torch.arange(latents_CFHW.shape[1], device=latents_CFHW.device) < num_first
        last = {"last": draw_latents(encoded, generator)} if condition.num_last else {}
        return {"frames": frames, "latents": latents_CFHW, **last}

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"text_encoder": load_encoder("T5EncoderModel", self.folder, "text_encoder", device, dtype)}

    def tokenize(
        self, tokenizers: Mapping[str, Any], captions: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        return pad_tokens(tokenizers["tokenizer"], captions, self.max_text_tokens)

    @property
    def padded_tokens(self) -> tuple[str, ...]:
        return ("attention_mask", "input_ids") if self.is_causal else ()

    def embed(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder = encoders["text_encoder"]
        mask = tokens["attention_mask"].to(encoder.device)
        # LTXPipeline lets the encoder attend to the padding, LTXConditionPipeline does not; each model learned its own.
        attention = {"attention_mask": mask} if self.is_causal else {}
        embeds = encoder(tokens["input_ids"].to(encoder.device), **attention)[0]
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask.bool()}

    def count_tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[TokenCount]:
        return count_tokens(tokenizers["tokenizer"], captions, self.max_text_tokens)

    def blank_text(self) -> dict[str, Tensor]:
        size = self.config("text_encoder")["d_model"]
        mask = torch.ones(self.max_text_tokens, dtype=torch.bool)
        return {"prompt_embeds": torch.zeros(self.max_text_tokens, size), "prompt_attention_mask": mask}

    def predict(
        self,
        transformers: Mapping[str, Any],
        latents_BCFHW: Tensor,
        timestep_B: Tensor,
        *,
        text: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        fps_B: Tensor,
    ) -> Tensor:
        transformer = transformers["transformer"]
        dtype = dtype_of(transformer)
        frames, height, width = latents_BCFHW.shape[2:]
        packed_BSC = _pack(put_given(latents_BCFHW, given))
        timestep = timestep_B[:, None] if self.is_causal else timestep_B
        if "frames" in given:
            timestep = timestep_B[:, None] * ~given["frames"].repeat_interleave(height * width, dim=1)
        if "last" in given:
            last_BSC = _pack(given["last"])
            packed_BSC = torch.cat([last_BSC, packed_BSC], dim=1)
            timestep = torch.cat([timestep.new_zeros(last_BSC.shape[:2]), timestep], dim=1)
        answer_BSC = transformer(
            hidden_states=packed_BSC.to(dtype),
            encoder_hidden_states=text["prompt_embeds"].to(dtype),
            timestep=timestep,
            encoder_attention_mask=text["prompt_attention_mask"],
            return_dict=False,
            **self._positions((frames, height, width), self._told(fps_B), given),
        )[0]
        answer_BSC = answer_BSC[:, answer_BSC.shape[1] - frames * height * width :]
        return answer_BSC.float().transpose(1, 2).unflatten(2, (frames, height, width))

    @cached_property
    def _grid(self) -> Callable[..., Tensor]:
        """Remembers its answers, because every step of a bucket asks for the same."""
        return cache(causal_grid)

    def _told(self, fps: Any) -> Any:
        """Frame rate that the model is told: as its positions are seconds, interpolation in time is a faster clip."""
        rope = self.options.rope_temporal
        return fps if rope is None else fps * max((rope.frames - 1) / (LONGEST - 1), 1.0)

    def _positions(self, shape: tuple[int, int, int], fps_B: Tensor, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Where the tokens lie in time and space, as the version's own pipeline says it."""
        frames, height, width = shape
        stride, space = self.strides
        if not self.is_causal:
            scale = (seconds_between(stride, fps_B), space, space)
            return {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
        size = (height, width, self.strides, fps_B.device)
        grid_3S = self._grid(tuple(range(0, stride * frames, stride)), *size)
        if "last" in given:
            # A frame by itself, at the moment of the clip's last one.
            last_3S = self._grid((stride * frames - 1,), *size)
            grid_3S = torch.cat([last_3S, grid_3S], dim=1)
        return {"video_coords": in_seconds(grid_3S, fps_B)}

    def pipeline(self, **parts: Any) -> Any:
        given = {name: parts.get(name) for name in ("vae", "text_encoder", "tokenizer", "transformer")}
        return self._pipeline_class()(scheduler=self.scheduler(), **given)

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        pipeline = self._pipeline_class().from_pretrained(self.folder, dtype=dtype, use_safetensors=True)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        return pipeline

    def _pipeline_class(self) -> Any:
        import diffusers

        if self.is_causal:
            return diffusers.LTXConditionPipeline
        return diffusers.LTXPipeline if self.task == TEXT_TO_VIDEO else diffusers.LTXImageToVideoPipeline

    def render(
        self,
        pipeline: Any,
        bucket: Bucket,
        options: SamplingOptions,
        *,
        image: Any = None,
        last_image: Any = None,
        **prompt: Any,
    ) -> Tensor:
        if options.num_inference_steps == 1 and pipeline.scheduler.config.get("shift_terminal"):
            raise UserError(
                "this model needs at least 2 denoising steps: its noise schedule stretches from first to last"
            )
        if self.is_causal:
            prompt["conditions"] = _conditions(image, last_image, bucket) or None
        elif image is not None:
            prompt["image"] = image
        frames_FCHW = pipeline(
            height=bucket.height,
            width=bucket.width,
            num_frames=bucket.num_frames,
            frame_rate=self._told(options.fps),
            num_inference_steps=options.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale,
            # 0.9.1 and later decode with a little noise; 0.9.0 ignores both.
            decode_timestep=0.05,
            decode_noise_scale=0.025,
            max_sequence_length=self.max_text_tokens,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **prompt,
        ).frames[0]
        return frames_out(frames_FCHW)


def _pack(latents_BCFHW: Tensor) -> Tensor:
    """Latents as a sequence of tokens, [B, S, C]."""
    return latents_BCFHW.flatten(2).transpose(1, 2)


def _conditions(image: Any, last_image: Any, bucket: Bucket) -> list[Any]:
    """Given frames as LTXConditionPipeline takes them."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    first = {"video": image} if isinstance(image, list) else {"image": image}
    found = [] if image is None else [LTXVideoCondition(**first, frame_index=0)]
    if last_image is not None:
        found.append(LTXVideoCondition(image=last_image, frame_index=bucket.num_frames - 1))
    return found
