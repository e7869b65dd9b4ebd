"""What each file holds, remembered between runs, so that a second run opens none of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from finetrainers.data.video import probe
from finetrainers.errors import UnusableClip
from finetrainers.folder import write_atomically
from finetrainers.hashing import file_digest
from finetrainers.types import Media

logger = logging.getLogger(__name__)

_VERSION = 1
"""Raised when `probe` learns to read something else from the same file, so that old findings are not used."""
_Stamp = tuple[int, int, int]
"""Size, time of the last change in ns, and inode: while they stay, so does the content."""


@dataclass(frozen=True)
class FileFacts:
    """What a file is: the digest of its content, by which it is known wherever it lies, and its header."""

    digest: str
    """Hex sha256."""
    media: Media


class FileIndex:
    """Facts of files by path, kept in a JSON file. May be asked from several threads; `save` makes it last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, tuple[_Stamp, FileFacts]] = _load(path)
        self._lock = threading.Lock()
        self._is_saved = True

    def look(self, path: Path) -> FileFacts:
        """Facts of a file: from memory where it has not changed, else by reading it. Raises UnusableClip."""
        key = os.path.abspath(path)  # noqa: PTH100 - Path.absolute takes ten times as long
        stamp = _stamp(key)
        known = self._known.get(key)
        if known and known[0] == stamp:
            return known[1]
        media = probe(Path(key))
        try:
            facts = FileFacts(file_digest(Path(key)), media)
        except OSError as error:
            raise UnusableClip(f"cannot be read ({error.strerror})") from error
        if _stamp(key) != stamp:
            raise UnusableClip("was changed while it was read; run again once it is written")
        with self._lock:
            self._known[key] = (stamp, facts)
            self._is_saved = False
        return facts

    def save(self) -> None:
        """Write what is known, whole or not at all; nothing is written when nothing is new."""
        with self._lock:
            if self._is_saved:
                return
            files = {
                key: [*stamp, facts.digest, *dataclasses.astuple(facts.media)]
                for key, (stamp, facts) in self._known.items()
            }
            write_atomically(self.path, json.dumps({"version": _VERSION, "files": files}))
            self._is_saved = True


def _stamp(path: str) -> _Stamp:
    try:
        status = os.stat(path)  # noqa: PTH116 - without a Path, for speed
    except (OSError, ValueError) as error:
        raise UnusableClip(f"cannot be read ({getattr(error, 'strerror', error)})") from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def _load(path: Path) -> dict[str, tuple[_Stamp, FileFacts]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            return {}
        return {
            key: ((size, changed, inode), FileFacts(str(digest), Media(*media)))
            for key, (size, changed, inode, digest, *media) in content["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s: cannot be used (%s); every clip is looked at again", path, error)
        return {}
