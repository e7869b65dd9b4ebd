"""The encoded dataset on disk: tensors under names made from what made them, so that nothing is encoded twice."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetrainers.folder import write_atomically

logger = logging.getLogger(__name__)

_MOST_MAPPED = 8192
"""Entries that stay mapped; Linux allows a process 65,530 mappings."""

Kind = Literal["videos", "conditions", "texts"]


class Cache:
    """A folder of safetensors files, `videos/ab/abcd....safetensors`, `conditions/...` and `texts/...`, which several
    runs may share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._whole_file = root / "whole.json"
        self._mapped: dict[str, dict[str, Tensor]] = {}
        self._whole = self._read_whole()

    def path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def missing(self, kind: Kind, keys: Iterable[str]) -> list[str]:
        """The keys that must be encoded, each once, in the order given. A damaged file counts as missing, and is said.

        A file's checksum is computed once and remembered with its size and time, so that a large cache opens at once.
        """
        found = [key for key in dict.fromkeys(keys) if not self._is_whole(kind, key)]
        self._save_whole()
        return found

    def read(self, kind: Kind, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, mapped from disk. An entry stays mapped, so that later epochs open no file."""
        if (entry := self._mapped.get(key)) is None:
            with safe_open(self.path(kind, key), framework="pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if len(self._mapped) < _MOST_MAPPED:
                self._mapped[key] = entry
        return entry

    def write(self, kind: Kind, key: str, tensors: dict[str, Tensor]) -> None:
        """Store an entry, whole or not at all."""
        path = self.path(kind, key)
        # Cloned, because tensors that are views of one another cannot be saved.
        data = save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
        write_atomically(path, data)
        self._whole[key] = [*_stamp(path), zlib.crc32(data)]
        self._mapped.pop(key, None)

    def remember(self) -> None:
        """Store the checksums of what was written."""
        self._save_whole()

    def _is_whole(self, kind: Kind, key: str) -> bool:
        path = self.path(kind, key)
        try:
            stamp = _stamp(path)
        except FileNotFoundError:
            return False
        known = self._whole.get(key)
        if known is not None and known[:2] == stamp:
            return True
        try:
            with safe_open(path, framework="pt"):
                checksum = zlib.crc32(path.read_bytes())
        except (SafetensorError, OSError) as error:
            logger.warning("cache entry %s is damaged and will be encoded again: %s", path.name, error)
            return False
        if known is not None and known[2] != checksum:
            logger.warning("cache entry %s is damaged and will be encoded again: its checksum differs", path.name)
            return False
        self._whole[key] = [*stamp, checksum]
        return True

    def _read_whole(self) -> dict[str, list[int]]:
        try:
            known = json.loads(self._whole_file.read_text())
            return {key: stamp for key, stamp in known.items() if isinstance(stamp, list) and len(stamp) == 3}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError):
            logger.warning("%s cannot be read; the cache's files are checked again", self._whole_file.name)
            return {}

    def _save_whole(self) -> None:
        if self._whole:
            write_atomically(self._whole_file, json.dumps(self._whole))


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]
