"""A run without files: the config of a published or tiny model, random weights of its size, and a batch in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.runs import Run
from benchmarks.published import PUBLISHED
from finetrainers.commands.completing import complete
from finetrainers.config.load import build_config
from finetrainers.config.schema import RunConfig
from finetrainers.data.batch import Drawn
from finetrainers.families.base import Family
from finetrainers.families.parts import cast_as_loaded
from finetrainers.methods.base import Method
from finetrainers.training.simulated import blank_batch
from finetrainers.types import Batch, Bucket, Condition
from tests.families.tiny import TINY

STD = 0.02
"""Of random weights."""


def open_config(run: Run, folder: Path, *, is_tiny: bool) -> tuple[Family, RunConfig, Bucket]:
    """The family of a run's model, its whole config, and the size of its clips."""
    row = TINY[PUBLISHED[run.model].row]
    model = folder / "model"
    if is_tiny:
        row.write(model)
    else:
        PUBLISHED[run.model].write(model)
    for weights in model.glob("transformer*/*.safetensors"):
        # Random ones take their place, and nothing else shall.
        weights.unlink()
    size = row.bucket if is_tiny else run.size
    settings: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(folder), "buckets": [size]},
        "output": str(folder),
    }
    for option, value in run.options.items():
        section, key = option.split(".")
        settings.setdefault(section, {})[key] = value
    family, config = complete(build_config(settings), weights=False)
    return family, config, Bucket.parse(size)


def random_models(method: Method, *, device: torch.device, seed: int) -> dict[str, nn.Module]:
    """What `method.load` gives, of random weights: in the types in which they are loaded, and on the host."""
    generator = torch.Generator(device).manual_seed(seed)
    models = method.build()
    for model in models.values():
        cast_as_loaded(model, method.weights_dtype, kept=getattr(model, "_keep_in_fp32_modules", None) or ())
        fill(model, generator, host=torch.device("cpu"))
    return models


def fill(network: nn.Module, generator: torch.Generator, *, host: torch.device) -> None:
    """Give a network of the meta device memory and numbers, one module after the other. Numbers are drawn where the
    generator is, because a host would take minutes."""
    for module in network.modules():
        module.to_empty(device=host, recurse=False)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            with torch.no_grad():
                tensor.copy_(_drawn(tensor, generator))


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.zeros(tensor.shape, dtype=tensor.dtype, device=generator.device)
    return drawn.normal_(0, STD, generator=generator) if tensor.is_floating_point() else drawn


def random_batch(method: Method, bucket: Bucket, *, device: torch.device, seed: int) -> Batch:
    """One clip and its text, in the shapes of the family, as training reads them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        number = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        number = number.to(tensor.dtype)
        return number.pin_memory() if device.type == "cuda" else number

    batch = blank_batch(method, bucket, Condition()).map(drawn)
    # A noise level is none of the normal law.
    batch.level_B.fill_(0.5)
    return batch


class OneBatch:
    """A stream that gives the same batch at every step; stands for BatchStream."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def start(self, position: int) -> Iterator[Drawn]:
        """From a position on, without end."""
        while True:
            yield Drawn(position, 0, self._batch, self._batch.size)
            position += 1
