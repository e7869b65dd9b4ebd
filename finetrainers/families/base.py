"""The contract of a model family: what a model says about itself. Training never asks which family it has."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import getfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetrainers.families.parts import load_tokenizer
from finetrainers.hashing import digest, file_digest, folder_digest
from finetrainers.types import Bucket, Condition, TokenCount

# Shape suffixes: B batch, C channels, F frames, H height, W width, L text tokens, D features.

TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "text-to-video", "image-to-video"


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
    coordinates, masks and whatever else its transformer wants lives inside `predict`.

    The networks of a family go by the names of their folders: `transformer`, `vae`, `text_encoder`, ...
    """

    name: ClassVar[str]
    """As shown by `finetrainers models`."""
    variants: ClassVar[str]
    """The published models that belong to it, in words."""
    pipelines: ClassVar[tuple[str, ...]]
    """Class names in `model_index.json` by which it is recognised."""
    tasks: ClassVar[tuple[str, ...]]
    """Of all its variants; those of the opened folder are `supported_tasks`."""
    laws: ClassVar[dict[str, dict[str, Any]]] = {}
    """How each published variant's noise levels are drawn by default, as options of `objective`."""
    lengths: ClassVar[tuple[int, ...]] = (0,)
    """Numbers of video tokens at which a law that looks at them is worth seeing."""
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """The transformer's lists of layers that repeat, in the order in which they run."""
    precise_layers: ClassVar[str] = "embed|vision"
    """Regular expression, found in the paths of those linear layers of the blocks, of transformer and text encoder,
    that are never held in low precision."""
    sensitive_layers: ClassVar[str] = "norm|modulation"
    """The same of those that are held in `int8` where others are in a coarser format: modulation, whose answer all
    tokens share, and which is a quarter of HunyuanVideo."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Options of the `model` section that only some families have, such as `rope_temporal`."""
    runs_on_meta: ClassVar[bool] = True
    """Whether `predict` runs without data, so that `plan` can count its work."""
    version: ClassVar[int] = 1
    """Raised whenever this family encodes the same clip or caption to other numbers than before."""

    def __init__(self, folder: Path, options: Any, *, vae_tiling: bool = False) -> None:
        self.folder = folder
        self.options = options
        """The `model` section of the config."""
        self.vae_tiling = vae_tiling

    # What it is.

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """What this folder's model does; the first is what it is for."""
        return self.tasks

    @property
    def task(self) -> str:
        """The task that is trained: the given one, or what the model is for."""
        return self.options.task or self.supported_tasks[0]

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Role -> subfolders of the model, for the roles `video_encoder` (with an image encoder, if the task has one),
        `text_encoder` (with its tokenizers) and `transformer`."""

    @property
    @abstractmethod
    def default_fps(self) -> float:
        """Frame rate of sample videos where the clips do not say."""

    @abstractmethod
    def defaults(self, method: str) -> dict[str, Any]:
        """The best known value, by `section.key`, of each option whose default only the family knows."""

    @property
    def longest(self) -> int | None:
        """Pixel frames of the longest clips that the base model was trained on, of a family that takes
        `rope_temporal`."""
        return None

    def check_options(self) -> str | None:
        """None if the options of `model` fit this folder's model; otherwise what is wrong and how to mend it."""
        return None

    # Sizes.

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents that are noised."""

    @abstractmethod
    def check_bucket(self, bucket: Bucket) -> str | None:
        """None if the model can take the size; otherwise why not and what it can take."""

    @abstractmethod
    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a clip."""

    @abstractmethod
    def num_tokens(self, bucket: Bucket) -> int:
        """Length of the transformer's video sequence for a clip of this size."""

    def sequence_length(self, bucket: Bucket, condition: Condition) -> int:
        """The same with frames given, which may lengthen it."""
        return self.num_tokens(bucket)

    # The objective that it was trained with.

    def alphas_cumprod(self) -> Tensor | None:
        """Signal kept at each of the discrete timesteps [1000], fp64, of a model that predicts v; None means flow
        matching."""
        return None

    @property
    def noise_range(self) -> tuple[float, float]:
        """Noise levels that are trained; narrower than (0, 1) for one of two experts."""
        return 0.0, 1.0

    # The transformer, or the transformers where noise levels are shared out between experts.

    @abstractmethod
    def build_transformers(self) -> dict[str, torch.nn.Module]:
        """What is trained, by name, as its configs describe it, with no weights read; meant for the meta device."""

    def blocks(self, name: str, model: Any) -> list[torch.nn.Module]:
        """The layers of a transformer or of a text encoder that repeat, in the order in which they run."""
        if name.startswith("transformer"):
            return [block for blocks in self.block_lists for block in getattr(model, blocks)]
        return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]

    def attention_layers(self, block: torch.nn.Module) -> list[torch.nn.Module]:
        """The attentions of a layer of the transformer that repeats, each with its projections: what has a `processor`,
        as diffusers has it."""
        return [module for module in block.modules() if hasattr(module, "processor")]

    def feed_forward_layers(self, block: torch.nn.Module) -> list[torch.nn.Module]:
        """The feed-forward parts of such a layer; the layer itself where they cannot be told apart."""
        from diffusers.models.attention import FeedForward

        return [module for module in block.modules() if isinstance(module, FeedForward)]

    @classmethod
    def context_plan(cls) -> dict[str, Any]:
        """How the transformer's video tokens are split over processes, by names of modules, as diffusers'
        `apply_context_parallel` takes it; empty where they cannot be. Self-attentions (`attn1`) and a timestep for each
        token are seen to."""
        return {}

    @abstractmethod
    def load_transformers(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        """What is trained, by name (`transformer`, and `transformer_2`), with its weights, on the CPU."""

    @abstractmethod
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
        """The transformer's answer, fp32, in the shape of the latents; called exactly as the pipeline calls it.

        `latents_BCFHW` are noised in all frames; where `given` says that frames are given clean, they are put in here.
        `fps_B` are frames per second, fp64. No number of a batch is told to the host, which would wait for the GPU.
        """

    # Video.

    @abstractmethod
    def load_video_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The `vae`, ready to encode and to decode, and what else looks at pixels for this task (`image_encoder`)."""

    @abstractmethod
    def encode_video(self, encoders: Mapping[str, Any], video_FCHW: Tensor) -> dict[str, Tensor]:
        """A clip (uint8, RGB) as the posterior of its latents: `mean` and `logvar` [C, F, H, W] in the VAE's dtype, and
        `shift` and `scale` [C] (fp32) by which a draw is normalised: `(draw - shift) * scale`."""

    # Conditions: frames of the clip that the model is given.

    def check_condition(self, condition: Condition, bucket: Bucket) -> str | None:
        """None if clips of this size can be trained with these frames given; otherwise why not and what can be."""
        return None if condition.is_none else f"{self.name} is given no frames; leave data.conditions out"

    def needs_encoding(self, condition: Condition) -> bool:
        """Whether `given` needs more of the clip than its latents: what `encode_condition` makes."""
        return False

    def encode_condition(
        self, encoders: Mapping[str, Any], video_FCHW: Tensor, condition: Condition, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What the model needs of the given frames of a clip (uint8, RGB), to be kept in the cache. Whatever is random
        in it comes from `generator`, which belongs to the clip."""
        raise NotImplementedError

    def blank_condition(self, bucket: Bucket, condition: Condition) -> dict[str, Tensor]:
        """Zeros of the shapes that `encode_condition` gives, for counting on the meta device."""
        return {}

    def given(
        self,
        condition: Condition,
        latents_CFHW: Tensor,
        encoded: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """What `predict` gets for one sample, from its clean normalised latents and what `encode_condition` made; a
        random draw where the official training draws, or the same at every call without a generator.

        Keys and shapes must be the same for all samples of one size under one condition. The key `frames` [F] (bool) is
        read by training as well: latent frames that are given clean, which are not to be learned.
        """
        return {}

    # Text.

    @property
    @abstractmethod
    def text_encoder_targets(self) -> str:
        """Regular expression for the layers of `text_encoder` that get adapters when it is trained too."""

    @property
    def text_sees_image(self) -> bool:
        """Whether the text encoder is shown the first frame as well, so that a caption's embedding is a clip's own."""
        return False

    def load_tokenizers(self) -> dict[str, Any]:
        """Tokenizers (and image processors of text encoders that see) by name; the one of `tokenizer/` unless said
        otherwise."""
        return {"tokenizer": load_tokenizer(self.folder)}

    @abstractmethod
    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The networks that embed text, by name."""

    @abstractmethod
    def tokenize(
        self, tokenizers: Mapping[str, Any], captions: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Captions as `embed` takes them, batch first and padded. `images` (uint8, CHW) belong to the captions, where
        `text_sees_image`."""

    @property
    def padded_tokens(self) -> tuple[str, ...]:
        """The attention mask of `tokenize` and its other tensors [B, L] of text, if neither `embed` nor `predict` reads
        their padding: it is then not embedded, and is zeros. Empty where padding is read."""
        return ()

    @abstractmethod
    def embed(self, encoders: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens as `predict` takes them for text, batch first. Gradients flow through it."""

    @abstractmethod
    def count_tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> list[TokenCount]:
        """What the tokenizer makes of each caption, cleaned as for the model."""

    @abstractmethod
    def blank_text(self) -> dict[str, Tensor]:
        """Zeros of the shapes that `embed` gives for one caption, without batch dimension; for counting."""

    # Sampling.

    @abstractmethod
    def pipeline(self, **parts: Any) -> Any:
        """The task's diffusers pipeline around the given parts, with a fresh scheduler; parts left out are None."""

    @abstractmethod
    def load_pipeline(self, dtype: torch.dtype) -> Any:
        """The task's whole diffusers pipeline from the model folder, on the CPU."""

    @abstractmethod
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
        """Run the pipeline: one video, uint8 FHWC, on the CPU. `prompt` holds `prompt` and `negative_prompt`, or what
        `prompt_arguments` made of embedded text; `image` (PIL, or a list of them for a longer beginning) and
        `last_image` (PIL) are frames that are given."""

    def prompt_arguments(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embedded texts (batch of one) as the pipeline's call takes them: under the names of `embed`, the negative
        ones with `negative_` before them, unless said otherwise."""
        return {**text, **{f"negative_{name}": tensor for name, tensor in negative.items()}}

    # Files.

    @property
    def index(self) -> dict[str, Any]:
        """The model_index.json."""
        return json.loads((self.folder / "model_index.json").read_text())

    def scheduler(self) -> Any:
        """A fresh noise schedule for sampling, of the class and with the settings that the folder says."""
        import diffusers

        config = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        return getattr(diffusers, config["_class_name"]).from_config(config)

    def notes(self) -> dict[str, Any]:
        """What trained weights must say about themselves, because the model is wrong for them without it."""
        rope = self.options.rope_temporal
        return {} if rope is None else {"rope_temporal": rope.model_dump()}

    def config(self, part: str) -> dict[str, Any]:
        """The config.json of one part."""
        return json.loads((self.folder / part / "config.json").read_text())

    def fingerprint(self, role: str) -> str:
        """Digest of the files behind a role; what was made with them is stale when this changes. Of a family from
        outside the package its code counts too, since nobody else sees to its `version`."""
        code = [] if type(self).__module__.startswith("finetrainers.") else [file_digest(Path(getfile(type(self))))]
        return digest([self.version, *code, *(folder_digest(self.folder / part) for part in self.parts[role])])
