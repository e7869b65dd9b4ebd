"""What every method shares: how a batch becomes a loss. A method itself says only which weights move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetrainers.families.base import Family
from finetrainers.objectives import FlowMatching
from finetrainers.types import Batch


class Method(ABC):
    """Family meets objective. Built on one family, one objective and the options of `method`."""

    name: ClassVar[str]

    def __init__(self, family: Family, objective: FlowMatching, options: Any, *, dtype: torch.dtype) -> None:
        self.family = family
        self.objective = objective
        self.options = options
        self.dtype = dtype
        """Arithmetic of the transformer."""

    @property
    @abstractmethod
    def weights_dtype(self) -> torch.dtype:
        """The type in which the transformer's weights are loaded."""

    @abstractmethod
    def attach(self, transformer: torch.nn.Module, seed: int) -> dict[str, torch.nn.Parameter]:
        """Prepare the transformer and return the parameters that move, fp32, by name. `seed` fixes what is drawn.

        Raises UserError when the options do not fit the model.
        """

    @abstractmethod
    def save(self, transformer: torch.nn.Module, folder: Path) -> None:
        """Write the weights that a user takes away into a folder, in diffusers' format."""

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        return nullcontext()

    def loss(self, transformer: torch.nn.Module, batch: Batch) -> Tensor:
        """Loss of each sample [B], fp32: the mean squared error over all tokens and channels of its latents."""
        noised = self.objective.noise(batch.latents_BCFHW, batch.noise_BCFHW, batch.sigma_B)
        with self.autocast(noised.input_BCFHW.device):
            prediction_BCFHW = self.family.predict(
                transformer, noised.input_BCFHW, noised.timestep_B, text=batch.text, fps=batch.fps
            )
        return (prediction_BCFHW - noised.target_BCFHW).square().flatten(1).mean(1)
