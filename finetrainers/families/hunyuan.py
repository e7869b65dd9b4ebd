"""HunyuanVideo: text to video, and image to video in two kinds, with 16 and with 33 input channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetrainers.families import hunyuan_text
from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Family, SamplingOptions
from finetrainers.families.parts import (
    build_network,
    dtype_of,
    frames_out,
    load_encoder,
    load_network,
    load_vae,
    put_given,
    refuse_bucket,
    to_pixels,
)
from finetrainers.families.rope import StretchedRope
from finetrainers.hashing import digest
from finetrainers.types import Bucket, Condition, TokenCount

# Shape suffixes: B batch, C channels, F frames, H height, W width.

FRAMES, SPACE, PATCH = 4, 8, 2
"""Pixels of a latent in time and in space; latents of a token in space."""
LONGEST = 129
"""Frames of the clips that the base models were trained on."""
IMAGE_STRIDES = {"token_replace": 4, "latent_concat": 2}
"""One in so many of an image's tokens is read as text, by how the model is given the image."""
TARGETS = (
    r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn\."
    r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
)


class HunyuanVideo(Family):
    """How the image is given is read from the transformer's config: in place of the first latent frame
    (`token_replace`), or beside the noised latents (`latent_concat`, of which 16 + 16 + 1 channels are the input)."""

    name = "hunyuan"
    variants = "HunyuanVideo, HunyuanVideo-I2V and HunyuanVideo-I2V-33ch"
    pipelines = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    tasks = (TEXT_TO_VIDEO, IMAGE_TO_VIDEO)
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    takes = frozenset({"embedded_guidance", "rope_temporal"})
    laws = {"all": {"timestep_sampling": "logit_normal", "shift": 7.0}}  # noqa: RUF012 - a constant of the class
    default_fps = 24.0
    longest = LONGEST

    @cached_property
    def image_condition(self) -> str | None:
        """How the model is given an image; None for text to video."""
        kind: str | None = self.config("transformer").get("image_condition_type")
        return kind

    @cached_property
    def has_guidance(self) -> bool:
        """Whether the transformer is told a guidance scale, which spares it the second forward of guidance."""
        return bool(self.config("transformer")["guidance_embeds"])

    @property
    def guidance_scale(self) -> float:
        """Of samples; 1 is none."""
        return 6.0 if self.has_guidance else 1.0

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return (IMAGE_TO_VIDEO,) if self.image_condition else (TEXT_TO_VIDEO,)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return {
            "video_encoder": ("vae",),
            "text_encoder": (*text, "image_processor") if self.text_sees_image else text,
            "transformer": ("transformer",),
        }

    @property
    def text_encoder_targets(self) -> str:
        config = self.config("text_encoder")
        # Behind the layer that is read no gradient arises, and data parallelism waits for one from each parameter.
        num_layers = config.get("text_config", config)["num_hidden_layers"] - hunyuan_text.UNUSED_LAYERS
        layers = "|".join(str(index) for index in range(num_layers))
        return rf"(model\.language_model\.)?layers\.({layers})\.self_attn\.[qkvo]_proj"

    def defaults(self, method: str) -> dict[str, Any]:
        # Sampling is told 6 and training 1: a clip of the dataset is an example of what to show, not of what guidance
        # would make of it.
        guidance = {"model.embedded_guidance": 1.0} if self.has_guidance else {}
        return {
            "model.task": self.task,
            # Smaller than the native 129x720x1280, whose 118800 tokens are beyond most cards.
            "data.buckets": ["49x544x960"],
            "data.conditions": {"first": 1.0} if self.image_condition else {},
            "method.target_modules": TARGETS,
            "objective.timestep_sampling": "logit_normal",
            "objective.shift": float(self.scheduler().config.shift),
            "optimizer.lr": 1e-4 if method == "lora" else 1e-5,
            "validation.guidance_scale": self.guidance_scale,
            **guidance,
        }

    def check_options(self) -> str | None:
        if self.options.embedded_guidance is None or self.has_guidance:
            return None
        return "model.embedded_guidance: this model is told no guidance scale; leave it out"

    @property
    def latent_channels(self) -> int:
        return int(self.config("transformer")["out_channels"])

    def check_bucket(self, bucket: Bucket) -> str | None:
        return refuse_bucket(bucket, frames=FRAMES, space=SPACE * PATCH, name="HunyuanVideo")

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        return _num_latents(bucket.num_frames), bucket.height // SPACE, bucket.width // SPACE

    def num_tokens(self, bucket: Bucket) -> int:
        frames, height, width = self.latent_shape(bucket)
        return frames * (height // PATCH) * (width // PATCH)

    def build_transformers(self) -> dict[str, torch.nn.Module]:
        network = build_network("HunyuanVideoTransformer3DModel", self.folder, "transformer")
        return {"transformer": self._reach_further(network)}

    def load_transformers(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        network = load_network("HunyuanVideoTransformer3DModel", self.folder, "transformer", dtype)
        return {"transformer": self._reach_further(network)}

    def feed_forward_layers(self, block: torch.nn.Module) -> list[torch.nn.Module]:
        # In single blocks attention and feed-forward lie side by side and share their last product.
        return super().feed_forward_layers(block) or [block]

    def _reach_further(self, transformer: Any) -> Any:
        """The transformer with the rotary positions that `model.rope_temporal` asks for."""
        rope = self.options.rope_temporal
        if rope is not None:
            lengths = {"trained": _num_latents(LONGEST), "wanted": _num_latents(rope.frames)}
            transformer.rope = StretchedRope(transformer.rope, method=rope.method, **lengths)
        return transformer

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
        model_input = put_given(latents_BCFHW, given)
        if "channels" in given:
            model_input = torch.cat([model_input, given["channels"]], dim=1)
        guidance_B = None
        if self.has_guidance:
            scale = 1.0 if self.options.embedded_guidance is None else self.options.embedded_guidance
            guidance_B = torch.full(timestep_B.shape, scale, dtype=dtype, device=timestep_B.device) * 1000.0
        answer_BCFHW: Tensor = transformer(
            hidden_states=model_input.to(dtype),
            timestep=timestep_B,
            encoder_hidden_states=text["prompt_embeds"].to(dtype),
            encoder_attention_mask=text["prompt_attention_mask"].to(dtype),
            pooled_projections=text["pooled_prompt_embeds"].to(dtype),
            guidance=guidance_B,
            return_dict=False,
        )[0]
        return answer_BCFHW.float()

    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"vae": load_vae("AutoencoderKLHunyuanVideo", self.folder, device, dtype, tiling=self.vae_tiling)}

    @torch.no_grad()
    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: Tensor) -> dict[str, Tensor]:
        vae = encoders["vae"]
        posterior = vae.encode(to_pixels(video_FCHW, vae)).latent_dist
        channels = posterior.mean.shape[1]
        return {
            "mean": posterior.mean[0],
            "logvar": posterior.logvar[0],
            "shift": torch.zeros(channels, device=vae.device),
            "scale": torch.full((channels,), vae.config.scaling_factor, device=vae.device),
        }

    def check_condition(self, condition: Condition, bucket: Bucket) -> str | None:
        if self.image_condition is None:
            return None if condition.is_none else "HunyuanVideo is given no frames; use HunyuanVideo-I2V for that"
        if condition != Condition(1):
            return f"HunyuanVideo-I2V is always given the first frame, and no other; use `first`, not `{condition}`"
        if bucket.num_frames == 1:
            return "an image that is given has nothing left to learn; use clips of 5 frames or more"
        return None

    def needs_encoding(self, condition: Condition) -> bool:
        # The VAE normalises over all frames that it sees: the first latent of a clip is not that of its first frame.
        return not condition.is_none

    @torch.no_grad()
    def encode_condition(
        self, encoders: Mapping[str, Any], video_FCHW: Tensor, condition: Condition, generator: torch.Generator
    ) -> dict[str, Tensor]:
        vae = encoders["vae"]
        latents_CFHW = vae.encode(to_pixels(video_FCHW[:1], vae)).latent_dist.mode()[0]
        return {"image": latents_CFHW.float() * vae.config.scaling_factor}

    def blank_condition(self, bucket: Bucket, condition: Condition) -> dict[str, Tensor]:
        if condition.is_none:
            return {}
        return {"image": torch.zeros(self.latent_channels, 1, *self.latent_shape(bucket)[1:])}

    def given(
        self,
        condition: Condition,
        latents_CFHW: Tensor,
        encoded: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        if condition.is_none:
            return {}
        image_CFHW = encoded["image"]
        if self.image_condition == "token_replace":
            is_first = torch.arange(latents_CFHW.shape[1], device=latents_CFHW.device) == 0
            return {"frames": is_first, "latents": image_CFHW.expand_as(latents_CFHW)}
        # All frames are noised and learned, the first as well.
        beside = torch.cat([image_CFHW, torch.ones_like(image_CFHW[:1])])
        later = beside.new_zeros(len(beside), latents_CFHW.shape[1] - 1, *beside.shape[2:])
        return {"channels": torch.cat([beside, later], dim=1)}

    @property
    def text_sees_image(self) -> bool:
        return self.image_condition is not None

    def fingerprint(self, role: str) -> str:
        # Both kinds of image to video share the text encoder, and keep different tokens of what it says.
        own = super().fingerprint(role)
        return digest([own, self.image_condition]) if role == "text_encoder" else own

    def load_tokenizers(self) -> dict[str, Any]:
        return hunyuan_text.load_tokenizers(self.folder, sees_image=self.text_sees_image)

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        kind = "LlavaForConditionalGeneration" if self.text_sees_image else "LlamaModel"
        return {
            "text_encoder": load_encoder(kind, self.folder, "text_encoder", device, dtype),
            "text_encoder_2": load_encoder("CLIPTextModel", self.folder, "text_encoder_2", device, dtype),
        }

    def tokenize(
        self, tokenizers: Mapping[str, Any], captions: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        if self.image_condition is None:
            return hunyuan_text.tokenize_captions(tokenizers, captions)
        assert images is not None, "this model's text encoder sees the first frame"
        return hunyuan_text.tokenize_with_images(
            tokenizers,
            captions,
            images,
            image_token=self.config("text_encoder")["image_token_index"],
            stride=IMAGE_STRIDES[self.image_condition],
        )

    padded_tokens = ("llama_attention_mask", "llama_input_ids", "kept_positions", "kept_mask")

    def embed(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return hunyuan_text.embed_tokens(encoders, tokens)

    def count_tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[TokenCount]:
        return hunyuan_text.count_caption_tokens(tokenizers["tokenizer"], captions, sees_image=self.text_sees_image)

    def blank_text(self) -> dict[str, Tensor]:
        config = self.config("transformer")
        stride = None if self.image_condition is None else IMAGE_STRIDES[self.image_condition]
        length = hunyuan_text.num_kept_tokens(stride)
        return {
            "prompt_embeds": torch.zeros(length, config["text_embed_dim"]),
            "prompt_attention_mask": torch.ones(length, dtype=torch.bool),
            "pooled_prompt_embeds": torch.zeros(config["pooled_projection_dim"]),
        }

    def pipeline(self, **parts: Any) -> Any:
        names = ["transformer", *self.parts["video_encoder"], *self.parts["text_encoder"]]
        return self._pipeline_class()(scheduler=self.scheduler(), **{name: parts.get(name) for name in names})

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        pipeline = self._pipeline_class().from_pretrained(
            self.folder,
            dtype=dtype,
            use_safetensors=True,
            tokenizer=hunyuan_text.load_llama_tokenizer(self.folder),
        )
        self._reach_further(pipeline.transformer)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        return pipeline

    def _pipeline_class(self) -> Any:
        import diffusers

        return diffusers.HunyuanVideoImageToVideoPipeline if self.image_condition else diffusers.HunyuanVideoPipeline

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
        """As the contract says; of image to video with 33 channels the pipeline leaves out the first 4 frames."""
        guidance = self.guidance_scale if options.guidance_scale is None else options.guidance_scale
        # A model that is told no guidance scale has only the guidance of two forwards.
        scales = {"guidance_scale": guidance} if self.has_guidance else {"true_cfg_scale": guidance}
        given = {"image": image} if self.image_condition else {}
        frames_FCHW = pipeline(
            height=bucket.height,
            width=bucket.width,
            num_frames=bucket.num_frames,
            num_inference_steps=options.num_inference_steps,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **scales,
            **given,
            **prompt,
        ).frames[0]
        return frames_out(frames_FCHW)


def _num_latents(num_frames: int) -> int:
    return (num_frames - 1) // FRAMES + 1
