"""What every method shares: how a batch becomes a loss. A method itself says only which weights move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetrainers.families.base import Family
from finetrainers.families.parts import build_encoder
from finetrainers.objectives import Objective
from finetrainers.types import Batch

# Shape suffixes: B batch, C channels, F latent frames, H, W latent height and width.


class Method(ABC):
    """Family meets objective. Built on one family, one objective and the options of `method`.

    What is trained goes by the names of the model's folders: `transformer`, and where there are more, `transformer_2`
    and `text_encoder`.
    """

    name: ClassVar[str]
    saves_trained_only: ClassVar[bool]
    """Whether what a user takes away is what moved, rather than whole models."""

    def __init__(self, family: Family, objective: Objective, options: Any, *, dtype: torch.dtype) -> None:
        self.family = family
        self.objective = objective
        self.options = options
        self.dtype = dtype
        """Arithmetic of the transformer."""

    @property
    def trains_text_encoder(self) -> bool:
        """Whether captions are embedded in every step, by a text encoder that learns, rather than once."""
        return False

    @property
    @abstractmethod
    def weights_dtype(self) -> torch.dtype:
        """The type in which the weights are loaded."""

    @property
    def trained_dtype(self) -> torch.dtype:
        """The type of what moves, and of its gradients."""
        return torch.float32

    @abstractmethod
    def attach(self, models: Mapping[str, nn.Module], seed: int) -> None:
        """Prepare the models, so that what moves, and nothing else, requires a gradient, and is of
        `trained_dtype`. `seed` fixes what is drawn.

        Raises UserError when the options do not fit the model.
        """

    def trained(self, models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
        """The parameters that move, by name."""
        return {
            f"{part}.{name}": parameter
            for part, model in models.items()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def copy_weights(self, models: Mapping[str, nn.Module]) -> Callable[[], None]:
        """Make the copies of weights that the method computes with, in another type than that in which they move, if
        it keeps any. What is returned brings them up to date, and is to be called whenever the weights have moved."""
        return lambda: None

    def copied_bytes(self, models: Mapping[str, nn.Module]) -> int:
        """What such copies take."""
        return 0

    @property
    def saved_dtype(self) -> torch.dtype | None:
        """The type of the weights that a user takes away; None leaves them as they are."""
        return None

    @abstractmethod
    def save(self, models: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
        """Write the weights that a user takes away into a folder, in diffusers' format: of each model that is trained
        the tensors that `Engine.weights` gave."""

    def load(self, device: torch.device) -> dict[str, nn.Module]:
        """The models that take part in training, with their weights, not yet on the device but for text encoders."""
        models: dict[str, nn.Module] = dict(self.family.load_transformers(self.weights_dtype))
        if self.trains_text_encoder:
            models |= self.family.load_text_encoders(device, self.weights_dtype)
        return models

    def build(self) -> dict[str, nn.Module]:
        """The same models without their weights, on the meta device."""
        with torch.device("meta"):
            models = self.family.build_transformers()
            if self.trains_text_encoder:
                for part in self.family.parts["text_encoder"]:
                    if part.startswith("text_encoder"):
                        models[part] = build_encoder(self.family.folder, part)
        return models

    @property
    def linear_dtype(self) -> torch.dtype | None:
        """What linear layers compute in, where their weights are of another type."""
        return None

    @property
    def float8_recipe(self) -> str | None:
        """torchao's name for how linear layers of the blocks compute in float8; None where none do."""
        return None

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        return nullcontext()

    def embed(self, models: Mapping[str, nn.Module], text: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A batch's text as the transformer takes it: what the cache held, or its tokens embedded now."""
        return self.family.embed(models, text) if self.trains_text_encoder else text

    def loss(self, models: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        """Loss of each sample [B], fp32: the mean squared error over the channels and tokens of its latents, less those
        that were given, times the objective's weight."""
        noised = self.objective.noise(batch.latents_BCFHW, batch.noise_BCFHW, batch.level_B)
        with self.autocast(noised.input_BCFHW.device):
            prediction_BCFHW = self.family.predict(
                models,
                noised.input_BCFHW,
                noised.timestep_B,
                text=self.embed(models, batch.text),
                given=batch.given,
                fps_B=batch.fps_B,
            )
        error_BCFHW = (prediction_BCFHW - noised.target_BCFHW).square()
        if "frames" in batch.given:
            learned_BF = (~batch.given["frames"]).float()
            loss_B = (error_BCFHW.mean((1, 3, 4)) * learned_BF).sum(1) / learned_BF.sum(1)
        else:
            loss_B = error_BCFHW.flatten(1).mean(1)
        return loss_B if noised.weight_B is None else loss_B * noised.weight_B
