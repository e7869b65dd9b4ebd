"""Names made from content: digests of values, files and folders, and the seed of everything that is drawn."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20
_WHOLE = 64 * _CHUNK
_PROBES = 32


def digest(value: Any) -> str:
    """Hex digest of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's whole content, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()


def weights_digest(path: Path) -> str:
    """Hex digest that tells weight files apart without reading tens of gigabytes.

    Files up to 64 MiB are read whole. Of larger ones the size, the start (a safetensors header) and 32 evenly spread
    pieces of 64 KiB are read: weights that were trained differ everywhere.
    """
    size = path.stat().st_size
    if size <= _WHOLE:
        return file_digest(path)
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        hasher.update(file.read(_CHUNK))
        for probe in range(_PROBES):
            file.seek(size * probe // _PROBES)
            hasher.update(file.read(_CHUNK // 16))
    return hasher.hexdigest()


def folder_digest(folder: Path) -> str:
    """Hex digest of a model part's folder: the name and content of each file in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return digest([[path.relative_to(folder).as_posix(), weights_digest(path)] for path in files])


def seed_for(seed: int, what: str, *keys: int | str) -> int:
    """A 63-bit seed for one draw: a function of the run's seed, what is drawn, and for which step or sample."""
    return int.from_bytes(hashlib.sha256(repr((seed, what, *keys)).encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, what: str, *keys: int | str) -> torch.Generator:
    """A CPU generator for one draw, so that order, workers and process count never change a run."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, what, *keys))
