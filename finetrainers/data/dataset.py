"""The clips of a run: sources read, each clip looked at, held-out clips set apart, and what cannot be used said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetrainers.config.schema import DataConfig
from finetrainers.data.index import FileIndex
from finetrainers.data.scan import Item, scan, split_by_hash
from finetrainers.data.source import read_source
from finetrainers.errors import UserError
from finetrainers.types import Bucket, Problem, Record

logger = logging.getLogger(__name__)

DEFAULT_SHARE, DEFAULT_FROM = 0.05, 40
"""Share held out when nothing is said, and the number of clips from which it is."""


@dataclass(frozen=True)
class Dataset:
    """What there is to encode and to learn from."""

    train: list[Item]
    held_out: list[Item]
    problems: list[Problem]
    """Clips left out, each with its reason."""
    num_clips: int
    """All that the sources list, usable or not."""


def open_dataset(
    options: DataConfig, index: FileIndex, progress: Callable[[str, int], AbstractContextManager[Any]]
) -> Dataset:
    """Read the sources and look at every clip. Raises UserError when nothing is left to train on, or, under `strict`,
    when any clip cannot be used."""
    buckets = [Bucket.parse(text) for text in options.buckets or ()]
    records = [record for source in options.train for record in read_source(source.path)]
    held_out_path = options.validation if isinstance(options.validation, str) else None
    held_out_records = read_source(held_out_path) if held_out_path else []
    always_given = sum(share for name, share in (options.conditions or {}).items() if name != "none") > 1 - 1e-6

    def look(some: Sequence[Record]) -> tuple[list[Item], list[Problem]]:
        with progress("looking at clips", len(some)) as phase:
            return scan(
                some,
                index,
                buckets=buckets,
                fps=options.fps,
                window=options.window,
                stills=not always_given,
                advance=phase.advance,
            )

    train, problems = look(records)
    held_out: list[Item] = []
    if held_out_path:
        held_out, more = look(held_out_records)
        problems += more
    num_clips = len(records) + len(held_out_records)
    name_problems(problems, total=num_clips, strict=options.strict)
    if not train:
        raise UserError("data.train holds no clip that can be used: " + _first_reasons(problems))
    if not held_out_path:
        train, held_out = _hold_out(train, options.validation)
    return Dataset(train, held_out, problems, num_clips)


def _hold_out(items: list[Item], share: Any) -> tuple[list[Item], list[Item]]:
    num_clips = len({item.digest for item in items})
    if share is None and num_clips < DEFAULT_FROM:
        logger.info("no clips are held out: data.validation is not set, and there are fewer than %d", DEFAULT_FROM)
        return items, []
    train, held_out = split_by_hash(items, DEFAULT_SHARE if share is None else share)
    names = sorted({item.record.name for item in held_out})
    logger.info("held out for validation: %d of %d clips (%s)", len(names), num_clips, _listing(names))
    return train, held_out


def name_problems(problems: Sequence[Problem], *, total: int, strict: bool) -> None:
    """Name each clip that cannot be used and why; under `strict` that ends the run."""
    if problems and strict:
        listing = "; ".join(f"{problem.name}: {problem.reason}" for problem in problems)
        raise UserError(f"{len(problems)} of {total} clips cannot be used, and data.strict is set: {listing}")
    for problem in problems:
        logger.warning("left out %s: %s", problem.name, problem.reason)


def _first_reasons(problems: Sequence[Problem]) -> str:
    shown = "; ".join(f"{problem.name}: {problem.reason}" for problem in problems[:3])
    return shown + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def cache_folder(options: DataConfig, default: Path) -> Path:
    """Where the encoded dataset lies: `data.cache`, or the default."""
    return Path(options.cache).expanduser() if options.cache else default
