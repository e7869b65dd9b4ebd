"""An encoder of a tiny model whose work is counted, and the clips that it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetrainers.config.schema import ModelConfig
from finetrainers.data.cache import Cache
from finetrainers.data.dataset import Dataset
from finetrainers.data.index import FileIndex
from finetrainers.data.scan import Item, scan
from finetrainers.data.source import read_source
from finetrainers.encoding import EncodedDataset, Encoder, Prompt, encode_dataset
from finetrainers.engines.single import SingleEngine
from finetrainers.families.find import find_family
from finetrainers.types import Bucket, Condition

BUCKET = Bucket(9, 64, 96)


@dataclass
class Counts:
    """What was encoded, and what was shown of it."""

    videos: int = 0
    conditions: int = 0
    texts: int = 0
    loads: int = 0
    advanced: int = 0

    def advance(self, n: int = 1) -> None:
        self.advanced += n

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Counts]:
        self.advanced -= total
        yield self


def counting(
    counts: Counts,
    model: Path,
    cache: Path,
    *,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 2,
    vae_tiling: bool = False,
    conditions: Sequence[str] = (),
    tokens_only: bool = False,
    **options: Any,
) -> Encoder:
    """An encoder of the tiny model whose calls are counted; `options` are of the `model` section."""
    family: Any = find_family(ModelConfig(path=str(model), **options), vae_tiling=vae_tiling)
    encode_video, encode_condition = family.encode_video, family.encode_condition
    load, stored = family.load_video_encoders, Cache(cache)
    write = stored.write

    def encode_one(*given: Any) -> Any:
        counts.videos += 1
        return encode_video(*given)

    def encode_given(encoders: Any, video_FCHW: torch.Tensor, *given: Any) -> Any:
        counts.conditions += 1
        # What LTX-Video is given goes through encode_video again.
        counts.videos -= 1
        return encode_condition(encoders, video_FCHW, *given)

    def write_one(kind: Any, *given: Any) -> None:
        counts.texts += kind == "texts"
        write(kind, *given)

    def load_one(*given: Any) -> Any:
        counts.loads += 1
        return load(*given)

    family.encode_video, family.encode_condition = encode_one, encode_given
    family.load_video_encoders, stored.write = load_one, write_one  # type: ignore[method-assign]
    return Encoder(
        family,
        stored,
        SingleEngine(),
        dtype,
        num_workers,
        counts.progress,
        conditions=[Condition.parse(text) for text in conditions],
        tokens_only=tokens_only,
    )


def items_of(folder: Path, index: Path, *, window: Any = "first") -> list[Item]:
    items, problems = scan(read_source(folder), FileIndex(index), buckets=[BUCKET], fps=None, window=window)
    assert not problems
    return items


def encoded(
    items: list[Item], model: Path, cache: Path, *, trigger: str = "", prompts: tuple[str, ...] = (), **options: Any
) -> tuple[EncodedDataset, Counts]:
    """The dataset with its last item held out, and what had to be encoded for it."""
    counts = Counts()
    encoder = counting(counts, model, cache, **options)
    dataset = Dataset(items[:-1], items[-1:], [], len(items))
    data = encode_dataset(encoder, dataset, trigger=trigger, prompts=[Prompt(text) for text in prompts])
    assert counts.advanced == 0, "each phase counts up to its total"
    return data, counts
