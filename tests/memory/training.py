"""A few steps of any tiny model, in this process, with measures that save memory."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetrainers.config.schema import FullOptions, LoraOptions
from finetrainers.engines.single import SingleEngine
from finetrainers.hashing import generator_for
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.training.measures import save_activations
from finetrainers.training.simulated import blank_batch
from finetrainers.types import Batch, Bucket, Condition
from tests.families.tiny import TINY
from tests.training.tiny_run import OBJECTIVE

FAMILIES = ("ltx-0.9.0", "cogvideox-5b", "hunyuan", "wan-2.1")
METHODS = ("lora", "full")
WORDS = ("none", "full", "every-2", "attention", "feed_forward")


def write_deeper(row: str, folder: Path, **changes: Any) -> Path:
    """The tiny model with more blocks, whose transformer is `changes` apart from it otherwise."""
    import diffusers

    TINY[row].write(folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    depth = dict.fromkeys(("num_layers", "num_single_layers"), 3 if "num_single_layers" in config else 5)
    config |= {key: value for key, value in (depth | changes).items() if key in config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(diffusers, config["_class_name"]).from_config(config).save_pretrained(folder / "transformer")
    return folder


def make_method(row: str, folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Method:
    """A method on a tiny model, with dropout where it has some."""
    family = TINY[row].open(folder)
    if name == "full":
        return find_method(FullOptions(name="full"), family, OBJECTIVE, dtype=dtype)
    targets = family.defaults("lora")["method.target_modules"]
    given = {"rank": 4, "target_modules": targets, "dropout": 0.1} | options
    return find_method(LoraOptions(**given), family, OBJECTIVE, dtype=dtype)


def random_batch(method: Method, bucket: str, *, condition: str = "none", size: int = 2) -> Batch:
    """A batch of numbers that its shapes alone fix."""
    blank = blank_batch(method, Bucket.parse(bucket), Condition.parse(condition), batch_size=size)

    def drawn(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or "mask" in name:
            return tensor
        return torch.randn(tensor.shape, generator=generator_for(0, name, zlib.crc32(bucket.encode()))).to(tensor)

    return replace(
        blank,
        latents_BCFHW=drawn("latents", blank.latents_BCFHW),
        noise_BCFHW=drawn("noise", blank.noise_BCFHW),
        text={name: drawn(name, tensor) for name, tensor in blank.text.items()},
        given={name: drawn(name, tensor) for name, tensor in blank.given.items()},
    )


@dataclass(frozen=True)
class Trained:
    """What a few steps gave."""

    losses: list[torch.Tensor]
    norms: list[torch.Tensor]
    weights: dict[str, torch.Tensor]

    def assert_equals(self, other: Trained) -> None:
        """To the bit."""
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), name
        assert torch.equal(torch.stack(self.losses), torch.stack(other.losses))
        assert torch.equal(torch.stack(self.norms), torch.stack(other.norms))


def load(method: Method, word: str, *, offload: bool = False) -> dict[str, torch.nn.Module]:
    """The models as a run makes them."""
    engine = SingleEngine()
    models = method.load(engine.device)
    method.attach(models, seed=1)
    save_activations(method, models, checkpointing=word, offload=offload)
    engine.prepare(models, {}, method.linear_dtype)
    for model in models.values():
        model.train()
    return models


def train(method: Method, models: dict[str, torch.nn.Module], batches: list[Batch], *, passes: int = 1) -> Trained:
    """A step for every `passes` batches."""
    trained = method.trained(models)
    device = next(iter(trained.values())).device
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses, norms = [], []
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        loss = method.loss(models, on_device(batch, device)).mean()
        loss.backward()
        losses.append(loss.detach())
        if (index + 1) % passes == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
    return Trained(losses, norms, {name: parameter.detach().clone() for name, parameter in trained.items()})


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device."""

    return batch.map(lambda tensor: tensor.to(device))
