"""CogVideoX 1.0 and 1.5: text to video, and video from its first frame."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetrainers.errors import UserError
from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Family, SamplingOptions
from finetrainers.families.cogvideox_positions import (
    FRAMES,
    SPACE,
    Rotary,
    base_size,
    pipeline_with,
    place_table,
    refuse_positions,
    rotary_positions,
)
from finetrainers.families.parts import (
    build_network,
    count_tokens,
    dtype_of,
    frames_out,
    load_encoder,
    load_network,
    load_vae,
    pad_tokens,
    refuse_bucket,
    to_pixels,
)
from finetrainers.latents import draw_latents
from finetrainers.types import Bucket, Condition, TokenCount

# Shape suffixes: N draws, B batch, C channels, F frames, H height, W width, L text tokens, D features.

CHUNK = 8
"""Frames that the VAE takes at once; only whole chunks, and one frame before, come back as many as they were."""
NUM_NOISED = 4
"""Noised versions of each first frame that are encoded, for training to draw from."""
OFS = 2.0
"""What the 1.5 image-to-video model is always told besides the timestep."""
GUIDANCE_SCALE = 6.0
TARGETS = r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"


class CogVideoX(Family):
    """What a folder holds is told by its transformer: image-to-video takes twice the channels, 1.5 makes one patch of
    two latent frames, 2B has no rotary positions, and 1.0 5B image-to-video a learned table of positions besides."""

    name = "cogvideox"
    variants = "CogVideoX 2B, 5B and 5B-I2V; CogVideoX 1.5 5B and 5B-I2V"
    pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    tasks = (TEXT_TO_VIDEO, IMAGE_TO_VIDEO)
    laws = {"all": {"timestep_sampling": "uniform", "shift": 1.0}}  # noqa: RUF012 - a constant of the class
    takes = frozenset({"learned_positions", "rope_temporal"})
    parts = {  # noqa: RUF012 - a constant of the class
        "video_encoder": ("vae",),
        "text_encoder": ("text_encoder", "tokenizer"),
        "transformer": ("transformer",),
    }
    text_encoder_targets = r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkvo]"

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The transformer's; what is younger than 2B is missing from its first folders."""
        return self.config("transformer")

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return (TEXT_TO_VIDEO,) if self._config["in_channels"] == self.latent_channels else (IMAGE_TO_VIDEO,)

    @property
    def default_fps(self) -> float:
        return 8.0 if self._patch_frames == 1 else 16.0

    @property
    def longest(self) -> int:
        return base_size(self._config).num_frames

    @property
    def latent_channels(self) -> int:
        return int(self._config["out_channels"])

    @property
    def max_text_tokens(self) -> int:
        return int(self._config["max_text_seq_length"])

    @property
    def _patch_frames(self) -> int:
        """Latent frames of one patch: 2 in CogVideoX 1.5."""
        return self._config.get("patch_size_t") or 1

    @property
    def _has_table(self) -> bool:
        return bool(self._config.get("use_learned_positional_embeddings"))

    def defaults(self, method: str) -> dict[str, Any]:
        return {
            "model.task": self.task,
            "model.learned_positions": "keep" if self._has_table else None,
            "data.buckets": ["81x768x1360" if self._patch_frames == 2 else str(base_size(self._config))],
            # As it was trained: one in twenty sees no frame.
            "data.conditions": {"first": 0.95} if self.task == IMAGE_TO_VIDEO else {},
            "method.target_modules": TARGETS,
            **{f"objective.{key}": value for key, value in self.laws["all"].items()},
            "optimizer.lr": 1e-4 if method == "lora" else 1e-5,
            "validation.guidance_scale": GUIDANCE_SCALE,
        }

    def check_options(self) -> str | None:
        if self.options.learned_positions is not None and not self._has_table:
            return "model.learned_positions is for CogVideoX-5b-I2V; this model has no learned positions: leave it out"
        if self.options.rope_temporal is not None and not self._config.get("use_rotary_positional_embeddings"):
            return "model.rope_temporal is for models with rotary positions; this one (CogVideoX-2b) has none"
        return None

    def notes(self) -> dict[str, Any]:
        mode = self.options.learned_positions
        return super().notes() | ({"learned_positions": mode} if mode in ("resize", "remove") else {})

    def check_bucket(self, bucket: Bucket) -> str | None:
        unfit = refuse_bucket(bucket, frames=CHUNK, space=SPACE * self._config["patch_size"], name="CogVideoX")
        without = refuse_positions(bucket, config=self._config, learned_positions=self.options.learned_positions)
        # A table that is kept fits one size only, so that a size near the given one is no help.
        return without or unfit if self._has_table else unfit or without

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        frames = (bucket.num_frames - 1) // FRAMES + 1
        return frames + -frames % self._patch_frames, bucket.height // SPACE, bucket.width // SPACE

    def num_tokens(self, bucket: Bucket) -> int:
        frames, height, width = self.latent_shape(bucket)
        patch = self._config["patch_size"]
        return int(frames // self._patch_frames * (height // patch) * (width // patch))

    def alphas_cumprod(self) -> Tensor:
        alphas: Tensor = self.scheduler().alphas_cumprod
        return alphas.double()

    def build_transformers(self) -> dict[str, torch.nn.Module]:
        transformer = build_network("CogVideoXTransformer3DModel", self.folder, "transformer")
        return {"transformer": place_table(transformer, self.options.learned_positions)}

    def load_transformers(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        transformer = load_network("CogVideoXTransformer3DModel", self.folder, "transformer", dtype)
        return {"transformer": place_table(transformer, self.options.learned_positions)}

    @cached_property
    def _rotary(self) -> Rotary:
        """Kept by size, because every step of a bucket asks for the same."""
        options = {"config": self._config, "rope_temporal": self.options.rope_temporal}
        return functools.cache(functools.partial(rotary_positions, **options))

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
        told: dict[str, Any] = {"image_rotary_emb": None}
        if self._config.get("use_rotary_positional_embeddings"):
            _, _, frames, height, width = latents_BCFHW.shape
            told["image_rotary_emb"] = self._rotary((frames, height, width), latents_BCFHW.device)
        if self.task == IMAGE_TO_VIDEO:
            image_BCFHW = torch.zeros_like(latents_BCFHW)
            image_BCFHW[:, :, :1] = given["image_latents"]
            latents_BCFHW = torch.cat([latents_BCFHW, image_BCFHW], dim=1)
            has_ofs = self._config.get("ofs_embed_dim") is not None
            told["ofs"] = latents_BCFHW.new_full((1,), OFS, dtype=dtype) if has_ofs else None
        answer_BFCHW = transformer(
            hidden_states=latents_BCFHW.transpose(1, 2).to(dtype),
            encoder_hidden_states=text["prompt_embeds"].to(dtype),
            timestep=timestep_B.long(),
            return_dict=False,
            **told,
        )[0]
        return answer_BFCHW.float().transpose(1, 2)

    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"vae": load_vae("AutoencoderKLCogVideoX", self.folder, device, dtype, tiling=self.vae_tiling)}

    @torch.no_grad()
    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: Tensor) -> dict[str, Tensor]:
        vae = encoders["vae"]
        encoded = self._posterior(vae, to_pixels(video_FCHW, vae), scale=vae.config.scaling_factor)
        return encoded | {name: self._whole_patches(encoded[name][0]) for name in ("mean", "logvar")}

    def _posterior(self, vae: Any, pixels_NCFHW: Tensor, *, scale: float) -> dict[str, Tensor]:
        posterior = vae.encode(pixels_NCFHW).latent_dist
        shift = torch.zeros(self.latent_channels, device=vae.device)
        return {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "shift": shift,
            "scale": torch.full_like(shift, scale),
        }

    def _whole_patches(self, latents_CFHW: Tensor) -> Tensor:
        """Frames are filled up in front, where the pipeline drops the surplus before it decodes."""
        missing = -latents_CFHW.shape[1] % self._patch_frames
        return torch.cat([latents_CFHW[:, :1].repeat(1, missing, 1, 1), latents_CFHW], dim=1)

    def check_condition(self, condition: Condition, bucket: Bucket) -> str | None:
        if condition.is_none:
            return None
        if self.task == TEXT_TO_VIDEO:
            return "this CogVideoX makes videos from text alone; leave data.conditions out, or take an I2V model"
        return None if condition == Condition(1) else f"CogVideoX is given the first frame or none, not {condition}"

    def needs_encoding(self, condition: Condition) -> bool:
        return not condition.is_none

    @torch.no_grad()
    def encode_condition(
        self, encoders: Mapping[str, Any], video_FCHW: Tensor, condition: Condition, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The posterior of the first frame, then of its noised versions: [N, C, 1, H, W]. The model learned from noised
        ones, of log-normal strength, so that it takes an image for a hint rather than for the frame itself."""
        vae = encoders["vae"]
        image_1CFHW = to_pixels(video_FCHW[:1], vae)
        noise_NCFHW = torch.randn(NUM_NOISED, *image_1CFHW.shape[1:], generator=generator)
        strength_N = torch.exp(-3.0 + 0.5 * torch.randn(NUM_NOISED, generator=generator))
        noised_NCFHW = image_1CFHW + (strength_N.view(-1, 1, 1, 1, 1) * noise_NCFHW).to(image_1CFHW)
        # The pipeline divides images by what it multiplies videos by, for models that were trained so.
        scale = 1 / vae.config.scaling_factor if vae.config.invert_scale_latents else vae.config.scaling_factor
        return self._posterior(vae, torch.cat([image_1CFHW, noised_NCFHW]), scale=scale)

    def blank_condition(self, bucket: Bucket, condition: Condition) -> dict[str, Tensor]:
        if condition.is_none:
            return {}
        channels = self.latent_channels
        moments = torch.zeros(1 + NUM_NOISED, channels, 1, *self.latent_shape(bucket)[1:])
        return {"mean": moments, "logvar": moments, "shift": torch.zeros(channels), "scale": torch.ones(channels)}

    def given(
        self,
        condition: Condition,
        latents_CFHW: Tensor,
        encoded: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        if self.task == TEXT_TO_VIDEO:
            return {}
        if condition.is_none:
            return {"image_latents": torch.zeros_like(latents_CFHW[:, :1])}
        which = 0 if generator is None else int(torch.randint(1, 1 + NUM_NOISED, (), generator=generator))
        moments = {**encoded, "mean": encoded["mean"][which], "logvar": encoded["logvar"][which]}
        return {"image_latents": draw_latents(moments, generator)}

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"text_encoder": load_encoder("T5EncoderModel", self.folder, "text_encoder", device, dtype)}

    def tokenize(
        self, tokenizers: Mapping[str, Any], captions: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        # No mask: the encoder and the transformer attend to the padding, as they learned to.
        return {"input_ids": pad_tokens(tokenizers["tokenizer"], captions, self.max_text_tokens)["input_ids"]}

    def embed(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder = encoders["text_encoder"]
        return {"prompt_embeds": encoder(tokens["input_ids"].to(encoder.device))[0]}

    def count_tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[TokenCount]:
        return count_tokens(tokenizers["tokenizer"], captions, self.max_text_tokens)

    def blank_text(self) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(self.max_text_tokens, self._config["text_embed_dim"])}

    def _pipeline_class(self) -> Any:
        import diffusers

        image_to_video = self.task == IMAGE_TO_VIDEO
        kind = diffusers.CogVideoXImageToVideoPipeline if image_to_video else diffusers.CogVideoXPipeline
        return kind if self.options.rope_temporal is None else pipeline_with(self._rotary, kind)

    def pipeline(self, **parts: Any) -> Any:
        given = {name: parts.get(name) for name in ("vae", "text_encoder", "tokenizer", "transformer")}
        return self._pipeline_class()(scheduler=self.scheduler(), **given)

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        pipeline = self._pipeline_class().from_pretrained(self.folder, dtype=dtype, use_safetensors=True)
        place_table(pipeline.transformer, self.options.learned_positions)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        return pipeline

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
        if self.task == IMAGE_TO_VIDEO:
            if image is None:
                raise UserError("this model makes a video from an image: give it one")
            prompt["image"] = image
        frames_FCHW = pipeline(
            height=bucket.height,
            width=bucket.width,
            num_frames=bucket.num_frames,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale,
            # The published settings: guidance that changes over the steps goes with the DPM scheduler.
            use_dynamic_cfg=type(pipeline.scheduler).__name__ == "CogVideoXDPMScheduler",
            max_sequence_length=self.max_text_tokens,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **prompt,
        ).frames[0]
        return frames_out(frames_FCHW)
