"""Wan 2.1 and 2.2: text to video, and image to video by extra channels or by a clean first frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetrainers.families import wan_conditions
from finetrainers.families.base import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Family, SamplingOptions
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
    to_pixels,
)
from finetrainers.families.wan_variant import LAWS, PAIR_LAW, SINGLE_LAW, Variant, shift_of
from finetrainers.types import Bucket, Condition, TokenCount

# Shape suffixes: B batch, C channels, F frames, H height, W width, L text tokens, D features.

MAX_TEXT_TOKENS = 512
"""The attention to images counts on exactly so many (diffusers: `WanAttnProcessor`)."""
TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"
"""All linear layers of the blocks."""
EXPERTS = {"both": ("transformer", "transformer_2"), "high_noise": ("transformer",), "low_noise": ("transformer_2",)}


class Wan(Family):
    """Frames are given to image-to-video models as channels beside the noised latents (2.1, 2.2 A14B), or put in clean
    with a timestep of 0 (2.2 TI2V-5B). A14B is a pair of transformers, each for a range of noise levels."""

    name = "wan"
    variants = "Wan 2.1 1.3B and 14B (text, first frame, first and last frame), Wan 2.2 A14B and TI2V-5B"
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    tasks = (TEXT_TO_VIDEO, IMAGE_TO_VIDEO)
    laws = LAWS
    block_lists = ("blocks",)
    takes = frozenset({"experts", "rope_temporal"})
    text_encoder_targets = r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkvo]"

    @cached_property
    def variant(self) -> Variant:
        """What the folder's configs say."""
        return Variant.read(self.index, self.config("transformer"), self.config("vae"))

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return self.variant.tasks

    @property
    def default_fps(self) -> float:
        return self.variant.default_fps

    @property
    def longest(self) -> int:
        return self.variant.native_bucket.num_frames

    @property
    def gives_images(self) -> bool:
        """Whether the transformer is given CLIP's view of frames."""
        return self.task == IMAGE_TO_VIDEO and self.variant.has_image_attention

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        return {
            "video_encoder": ("vae", "image_encoder", "image_processor") if self.gives_images else ("vae",),
            "text_encoder": ("text_encoder", "tokenizer"),
            "transformer": ("transformer",) if self.variant.boundary is None else EXPERTS["both"],
        }

    def defaults(self, method: str) -> dict[str, Any]:
        is_pair = self.variant.boundary is not None
        scale, scale_2 = self.variant.guidance_scales(self.task)
        return {
            "model.task": self.task,
            "model.experts": "both" if is_pair else None,
            "data.buckets": [str(self.variant.native_bucket)],
            "data.conditions": {} if self.task == TEXT_TO_VIDEO else {self.variant.conditions(self.task)[0]: 1.0},
            "method.target_modules": TARGETS,
            "objective.timestep_sampling": PAIR_LAW if is_pair else SINGLE_LAW,
            "objective.shift": shift_of(self.scheduler()),
            "optimizer.lr": 1e-4 if method == "lora" else 1e-5,
            # One number cannot say two different ones; None takes both.
            "validation.guidance_scale": scale if scale_2 in (None, scale) else None,
        }

    def check_options(self) -> str | None:
        if self.options.experts is not None and self.variant.boundary is None:
            return "model.experts is for Wan 2.2 A14B, which has two; this model has one transformer, so leave it out"
        reason = self.variant.check_channels()
        return reason and f"model.path {self.options.path}: {reason}"

    @property
    def latent_channels(self) -> int:
        return self.variant.latent_channels

    def check_bucket(self, bucket: Bucket) -> str | None:
        return self.variant.check_bucket(bucket)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        return self.variant.latent_shape(bucket)

    def num_tokens(self, bucket: Bucket) -> int:
        return self.variant.num_tokens(bucket)

    @classmethod
    def context_plan(cls) -> dict[str, Any]:
        from diffusers import WanTransformer3DModel

        # Theirs splits TI2V-5B's timestep as well, and warns of all others'.
        return {module: split for module, split in WanTransformer3DModel._cp_plan.items() if module}

    @property
    def trained_names(self) -> tuple[str, ...]:
        """The transformers that are trained."""
        return EXPERTS[self.options.experts or "both"] if self.variant.boundary is not None else ("transformer",)

    @property
    def noise_range(self) -> tuple[float, float]:
        boundary = self.variant.boundary
        if boundary is None or len(self.trained_names) == 2:
            return 0.0, 1.0
        return (boundary, 1.0) if self.trained_names == ("transformer",) else (0.0, boundary)

    def build_transformers(self) -> dict[str, torch.nn.Module]:
        return {name: build_network("WanTransformer3DModel", self.folder, name) for name in self.trained_names}

    def load_transformers(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        return {name: self._load_transformer(name, dtype) for name in self.trained_names}

    def _load_transformer(self, name: str, dtype: torch.dtype) -> Any:
        # Loading keeps norms, time embedding and rotary positions in fp32; a cast afterwards would not.
        transformer = load_network("WanTransformer3DModel", self.folder, name, dtype)
        self.variant.stretch_time(transformer, self.options.rope_temporal)
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
        known = {name: transformers[name] for name in EXPERTS["both"] if name in transformers}
        if len(known) == 1:
            (transformer,) = known.values()
            return self._answer(transformer, latents_BCFHW, timestep_B, text, given)
        assert self.variant.boundary is not None
        # Which expert runs must be known here, so the device is waited for.
        is_high = (timestep_B >= 1000 * self.variant.boundary).tolist()
        answer_BCFHW = torch.empty_like(latents_BCFHW)
        for name, wanted in (("transformer", True), ("transformer_2", False)):
            if rows := [row for row, high in enumerate(is_high) if high is wanted]:
                part = ({key: tensor[rows] for key, tensor in tensors.items()} for tensors in (text, given))
                answer_BCFHW[rows] = self._answer(transformers[name], latents_BCFHW[rows], timestep_B[rows], *part)
        return answer_BCFHW

    def _answer(
        self,
        transformer: Any,
        latents_BCFHW: Tensor,
        timestep_B: Tensor,
        text: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
    ) -> Tensor:
        """One transformer's answer to samples that are all its own."""
        dtype, timestep = dtype_of(transformer), timestep_B
        hidden_BCFHW, images = put_given(latents_BCFHW, given), None
        if self.variant.expands_timesteps:
            timestep = wan_conditions.token_timesteps(timestep_B, latents_BCFHW, given, self.variant.patch)
        if "condition" in given:
            hidden_BCFHW = torch.cat([hidden_BCFHW, given["condition"]], dim=1)
        if "image_embeds" in given:
            # The images of a sample follow each other along the batch.
            images = given["image_embeds"].flatten(0, 1).to(dtype)
        answer: Tensor = transformer(
            hidden_states=hidden_BCFHW.to(dtype),
            timestep=timestep,
            encoder_hidden_states=text["prompt_embeds"].to(dtype),
            encoder_hidden_states_image=images,
            return_dict=False,
        )[0]
        return answer.float()

    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        # Meant for fp32 whatever the transformer computes in, as CLIP is.
        vae = load_vae("AutoencoderKLWan", self.folder, device, torch.float32, tiling=self.vae_tiling)
        return {"vae": vae, **(wan_conditions.load_clip(self.folder, device) if self.gives_images else {})}

    @torch.no_grad()
    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: Tensor) -> dict[str, Tensor]:
        vae = encoders["vae"]
        posterior = vae.encode(to_pixels(video_FCHW, vae)).latent_dist
        shift, scale = wan_conditions.normalisation(vae)
        return {"mean": posterior.mean[0], "logvar": posterior.logvar[0], "shift": shift, "scale": scale}

    def check_condition(self, condition: Condition, bucket: Bucket) -> str | None:
        return self.variant.check_condition(condition, bucket, self.task)

    def needs_encoding(self, condition: Condition) -> bool:
        # TI2V-5B is given the first latent as it is: the VAE is causal and makes the same of the frame alone.
        return not (condition.is_none or self.variant.expands_timesteps)

    @torch.no_grad()
    def encode_condition(
        self, encoders: Mapping[str, Any], video_FCHW: Tensor, condition: Condition, generator: torch.Generator
    ) -> dict[str, Tensor]:
        vae = encoders["vae"]
        pixels_BCFHW = wan_conditions.only_given(to_pixels(video_FCHW, vae), condition)
        shift, scale = (numbers.view(-1, 1, 1, 1) for numbers in wan_conditions.normalisation(vae))
        encoded = {"condition": (vae.encode(pixels_BCFHW).latent_dist.mode()[0] - shift) * scale}
        if self.gives_images:
            encoded["image_embeds"] = wan_conditions.look_at(encoders, video_FCHW, condition)
        return encoded

    def blank_condition(self, bucket: Bucket, condition: Condition) -> dict[str, Tensor]:
        if not self.needs_encoding(condition):
            return {}
        blank = {"condition": torch.zeros(self.latent_channels, *self.latent_shape(bucket))}
        if self.gives_images:
            blank["image_embeds"] = wan_conditions.blank_look(self.folder, condition)
        return blank

    def given(
        self,
        condition: Condition,
        latents_CFHW: Tensor,
        encoded: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        if condition.is_none:
            return {}
        if self.variant.expands_timesteps:
            frames = torch.arange(latents_CFHW.shape[1], device=latents_CFHW.device) < 1
            return {"frames": frames, "latents": latents_CFHW}
        mask = wan_conditions.given_mask(condition, encoded["condition"], self.variant.frames)
        return {**encoded, "condition": torch.cat([mask, encoded["condition"]])}

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"text_encoder": load_encoder("UMT5EncoderModel", self.folder, "text_encoder", device, dtype)}

    def tokenize(
        self, tokenizers: Mapping[str, Any], captions: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        return pad_tokens(tokenizers["tokenizer"], _cleaned(captions), MAX_TEXT_TOKENS)

    padded_tokens = ("attention_mask", "input_ids")

    def embed(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder = encoders["text_encoder"]
        mask = tokens["attention_mask"].to(encoder.device)
        embeds_BLD = encoder(tokens["input_ids"].to(encoder.device), attention_mask=mask).last_hidden_state
        # The transformer attends to all rows and knows those past the text as zeros.
        return {"prompt_embeds": embeds_BLD.masked_fill(mask[:, :, None].to(embeds_BLD.device) == 0, 0.0)}

    def count_tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[TokenCount]:
        return count_tokens(tokenizers["tokenizer"], _cleaned(captions), MAX_TEXT_TOKENS)

    def blank_text(self) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(MAX_TEXT_TOKENS, self.variant.text_dim)}

    def pipeline(self, **parts: Any) -> Any:
        """An expert that is not trained is loaded from the folder, in the type and to the device of the trained one."""
        names = ["vae", "text_encoder", "tokenizer", "transformer", "transformer_2"]
        if self.task == IMAGE_TO_VIDEO:
            names += ["image_encoder", "image_processor"]
        given = {name: parts.get(name) for name in names}
        if self.variant.boundary is not None and len(self.trained_names) == 1:
            trained = parts[self.trained_names[0]]
            (other,) = set(EXPERTS["both"]) - set(self.trained_names)
            given[other] = self._load_transformer(other, trained.dtype).requires_grad_(False).to(trained.device)
        return self._pipeline_class()(
            scheduler=self.scheduler(),
            boundary_ratio=self.variant.boundary,
            expand_timesteps=self.variant.expands_timesteps,
            **given,
        )

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        pipeline = self._pipeline_class().from_pretrained(
            self.folder,
            dtype={"default": dtype, "vae": torch.float32, "image_encoder": torch.float32},
            boundary_ratio=self.variant.boundary,
            use_safetensors=True,
        )
        for name in self.parts["transformer"]:
            self.variant.stretch_time(getattr(pipeline, name), self.options.rope_temporal)
        if self.vae_tiling:
            pipeline.vae.enable_tiling()
        return pipeline

    def _pipeline_class(self) -> Any:
        import diffusers

        return diffusers.WanPipeline if self.task == TEXT_TO_VIDEO else diffusers.WanImageToVideoPipeline

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
        scale, scale_2 = self.variant.guidance_scales(self.task)
        if options.guidance_scale is not None:
            scale, scale_2 = options.guidance_scale, None
        if self.task == IMAGE_TO_VIDEO:
            prompt |= {"image": image, "last_image": last_image}
        frames_FCHW = pipeline(
            height=bucket.height,
            width=bucket.width,
            num_frames=bucket.num_frames,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=scale,
            guidance_scale_2=scale_2,
            max_sequence_length=MAX_TEXT_TOKENS,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **prompt,
        ).frames[0]
        return frames_out(frames_FCHW)


def _cleaned(captions: Sequence[str]) -> list[str]:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return [prompt_clean(caption) for caption in captions]
