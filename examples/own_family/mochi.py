"""Mochi-1, text to video: a family of one's own, for `model.family: mochi.Mochi`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import MochiPipeline
from torch import Tensor

from finetrainers.errors import UserError
from finetrainers.families import parts
from finetrainers.families.base import TEXT_TO_VIDEO, Family, SamplingOptions
from finetrainers.types import Bucket, TokenCount

# Shape suffixes: B batch, C channels, F frames, H height, W width, L text tokens.

FRAMES, SPACE, PATCH = 6, 8, 2  # pixels of a latent in time and in space, latents of a token's side
MAX_TEXT_TOKENS = 256
GUIDANCE_SCALE = 4.5


class Mochi(Family):
    """Its time runs from noise at 0 to the clip at 1000, and it predicts `latents - noise`: both the other way round
    from every other flow model. `predict` turns them, and nothing else has to know."""

    name = "mochi"
    pipelines = ("MochiPipeline",)
    tasks = (TEXT_TO_VIDEO,)
    parts: ClassVar = {
        "video_encoder": ("vae",),
        "text_encoder": ("text_encoder", "tokenizer"),
        "transformer": ("transformer",),
    }
    latent_channels = 12
    default_fps = 30.0
    runs_on_meta = False  # its attention asks which tokens the mask leaves
    text_encoder_targets = r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkvo]"

    def defaults(self, method: str) -> dict[str, Any]:
        return {
            "model.task": self.task,
            "data.buckets": ["37x480x848"],
            "data.conditions": {},
            "method.target_modules": r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            "objective.timestep_sampling": "uniform",
            "objective.shift": 1.0,
            "optimizer.lr": 2e-4 if method == "lora" else 1e-5,
            "validation.guidance_scale": GUIDANCE_SCALE,
        }

    def check_bucket(self, bucket: Bucket) -> str | None:
        return parts.refuse_bucket(bucket, frames=FRAMES, space=SPACE * PATCH, name="Mochi-1")

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        return (bucket.num_frames - 1) // FRAMES + 1, bucket.height // SPACE, bucket.width // SPACE

    def num_tokens(self, bucket: Bucket) -> int:
        frames, height, width = self.latent_shape(bucket)
        return frames * (height // PATCH) * (width // PATCH)

    def build_transformers(self) -> dict[str, torch.nn.Module]:
        return {"transformer": parts.build_network("MochiTransformer3DModel", self.folder, "transformer")}

    def load_transformers(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        return {"transformer": parts.load_network("MochiTransformer3DModel", self.folder, "transformer", dtype)}

    def predict(
        self, transformers: Mapping[str, Any], latents_BCFHW: Tensor, timestep_B: Tensor, *, text: Any, **others: Any
    ) -> Tensor:
        transformer = transformers["transformer"]
        dtype = parts.dtype_of(transformer)
        answer_BCFHW: Tensor = transformer(
            hidden_states=latents_BCFHW.to(dtype),
            encoder_hidden_states=text["prompt_embeds"].to(dtype),
            timestep=1000 - timestep_B,
            encoder_attention_mask=text["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return -answer_BCFHW.float()

    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"vae": parts.load_vae("AutoencoderKLMochi", self.folder, device, dtype, tiling=self.vae_tiling)}

    @torch.no_grad()
    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: Tensor) -> dict[str, Tensor]:
        vae = encoders["vae"]
        # The pixels stay fp32: the encoder begins with their sines, at up to 128 periods, which bf16 would make noise.
        with torch.autocast(vae.device.type, dtype=vae.dtype, enabled=vae.dtype != torch.float32):
            posterior = vae.encode(parts.to_pixels(video_FCHW, vae, torch.float32)).latent_dist
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        scale = vae.config.scaling_factor / std
        return {"mean": posterior.mean[0], "logvar": posterior.logvar[0], "shift": mean, "scale": scale}

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"text_encoder": parts.load_encoder("T5EncoderModel", self.folder, "text_encoder", device, dtype)}

    @property
    def zeroes_empty_prompt(self) -> bool:
        """Whether an empty prompt is no token at all, not even the one that ends a text."""
        return bool(self.index.get("force_zeros_for_empty_prompt", False))

    def tokenize(self, tokenizers: Mapping[str, Any], captions: Sequence[str], images: Any = None) -> dict[str, Tensor]:
        tokens = parts.pad_tokens(tokenizers["tokenizer"], captions, MAX_TEXT_TOKENS)
        kept_B1 = torch.tensor([[bool(caption) or not self.zeroes_empty_prompt] for caption in captions])
        return {name: tokens_BL * kept_B1 for name, tokens_BL in tokens.items()}

    def embed(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder = encoders["text_encoder"]
        mask_BL = tokens["attention_mask"].bool().to(encoder.device)
        embeds = encoder(tokens["input_ids"].to(encoder.device), attention_mask=mask_BL)[0]
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask_BL}

    def count_tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[TokenCount]:
        return parts.count_tokens(tokenizers["tokenizer"], captions, MAX_TEXT_TOKENS)

    def blank_text(self) -> dict[str, Tensor]:
        embeds = torch.zeros(MAX_TEXT_TOKENS, self.config("text_encoder")["d_model"])
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(MAX_TEXT_TOKENS, dtype=torch.bool)}

    def pipeline(self, **given: Any) -> Any:
        named = dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer")) | given
        return MochiPipeline(scheduler=self.scheduler(), force_zeros_for_empty_prompt=self.zeroes_empty_prompt, **named)

    def load_pipeline(self, dtype: torch.dtype) -> Any:
        encoders = self.load_video_encoders(torch.device("cpu"), dtype)
        return MochiPipeline.from_pretrained(self.folder, **encoders, dtype=dtype, use_safetensors=True)

    def render(self, pipeline: Any, bucket: Bucket, options: SamplingOptions, **prompt: Any) -> Tensor:
        if options.num_inference_steps == 1:
            raise UserError("Mochi-1 needs at least 2 denoising steps: the halves of its schedule differ")
        frames_FCHW = pipeline(
            **vars(bucket),
            num_inference_steps=options.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE if options.guidance_scale is None else options.guidance_scale,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            **prompt,
        ).frames[0]
        return parts.frames_out(frames_FCHW)
