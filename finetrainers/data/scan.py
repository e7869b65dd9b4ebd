"""From records to what will be encoded: each clip looked at, brought to its bucket and cut into windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from finetrainers.data.bucket import choose_bucket, choose_windows
from finetrainers.data.index import FileIndex
from finetrainers.errors import UnusableClip, UserError
from finetrainers.types import Bucket, Media, Problem, Record, Window


@dataclass(frozen=True)
class Item:
    """One window of one clip, which will be one sample."""

    name: str
    """The record's name, with the window's number where a clip gives several."""
    record: Record
    digest: str
    """Of the file's content."""
    media: Media
    window: Window
    bucket: Bucket


def scan(
    records: Sequence[Record],
    index: FileIndex,
    *,
    buckets: Sequence[Bucket],
    fps: float | None,
    window: Literal["first", "middle", "all"],
    stills: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Item], list[Problem]]:
    """Look at each clip. What cannot be used comes back as a Problem with its reason; nothing is dropped in silence.

    `stills` is whether a single frame can be learned from. `advance` is called after each record.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    for record in records:
        try:
            facts = index.look(record.path)
            if facts.media.is_image and not stills:
                raise UnusableClip("is a still image: once its frame is given, nothing is left to learn")
            bucket = choose_bucket(facts.media, buckets, fps)
            windows = choose_windows(facts.media, bucket, fps, window)
        except UnusableClip as error:
            problems.append(Problem(record.name, str(error)))
        else:
            for number, part in enumerate(windows):
                name = record.name if len(windows) == 1 else f"{record.name}#{number}"
                items.append(Item(name, record, facts.digest, facts.media, part, bucket))
        advance()
    index.save()
    return items, problems


def split_by_hash(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Training and held-out items. A clip's side is decided by the hash of its content alone, so that it never moves
    when others come or go; at least one clip is held out, and at least one is left to train on."""
    digests = sorted({item.digest for item in items})
    if len(digests) < 2:
        raise UserError(
            f"data.validation {share} holds out a share of the clips, but there is only {len(digests)} to share; "
            "give data.validation a path, or more clips"
        )
    held_out = {digest for digest in digests if int(digest[:12], 16) / 16**12 < share} or {digests[0]}
    if len(held_out) == len(digests):
        held_out.remove(digests[-1])
    train = [item for item in items if item.digest not in held_out]
    return train, [item for item in items if item.digest in held_out]
