"""A tiny model folder for every family, written to disk as a normal diffusers folder, so that the real loaders run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetrainers.demo.model import write_tiny_ltx


@dataclass(frozen=True)
class TinyModel:
    """One row: how to write it, and what it is."""

    family: str
    write: Callable[[Path], Path]
    bucket: str
    """A size that it takes, small and not square, so that height and width cannot be mixed up."""
    pipeline: str
    """The diffusers class that must load what is trained."""


TINY = {
    "ltx-0.9.0": TinyModel("ltx", write_tiny_ltx, "17x64x96", "LTXPipeline"),
    "ltx-0.9.5": TinyModel("ltx", partial(write_tiny_ltx, causal=True), "17x64x96", "LTXConditionPipeline"),
}
