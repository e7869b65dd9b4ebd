"""What tests know of one tiny model: how it is written, what it does, and how its pipeline calls its transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetrainers.config.schema import ModelConfig
from finetrainers.families.base import Family
from finetrainers.families.find import find_family


@dataclass(frozen=True)
class Row:
    """One variant and task of a family."""

    family: str
    write: Callable[[Path], Path]
    """Writes the tiny model as a normal diffusers folder and gives the folder back."""
    task: str
    bucket: str
    """A size that it takes, small and not square, so that height and width cannot be mixed up."""
    other_bucket: str
    """Another one, with other frames and another shape."""
    pipeline: str
    """The diffusers class that must load what is trained."""
    noisy: Callable[[Mapping[str, Any], tuple[int, int, int]], Tensor]
    """The noised latents, BCFHW, in what the pipeline handed to the transformer; given the latents' F, H, W."""
    answer: Callable[[Tensor, Mapping[str, Any]], Tensor]
    """The other way: a prediction, BCFHW, as the transformer would give it back, for the call that it answers."""
    timestep: Callable[[Mapping[str, Any]], Tensor] = lambda call: call["timestep"].float()
    """Training's timestep, in [0, 1000], in what the pipeline handed to the transformer."""
    conditions: tuple[str, ...] = ("none",)
    """Each is compared with the pipeline, and the first is trained with."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More of the `model` section."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """More of the pipeline's call when it is compared with training: where the two differ on purpose."""

    def open(self, folder: Path, **options: Any) -> Family:
        """The family on a folder that `write` wrote."""
        return find_family(ModelConfig(path=str(folder), **{"task": self.task, **self.options, **options}))
