"""Every name on disk under a run's output folder, and how a file comes to be there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LORA_FILE = "pytorch_lora_weights.safetensors"
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """`step-00000100`: sorts by step."""
    return f"step-{step:08d}"


def slug(text: str) -> str:
    """A short file name made of a prompt's letters and digits, which cannot leave its folder."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:48].strip("-") or "prompt"


class RunFolder:
    """The layout of OUTPUT: names only; nothing is created by asking for a name."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def memory(self) -> Path:
        return self.root / "memory.jsonl"

    @property
    def problems(self) -> Path:
        return self.root / "problems.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def samples(self) -> Path:
        return self.root / "samples"


def steps_in(folder: Path) -> dict[int, Path]:
    """The `step-N` folders under `folder`, by step, oldest first; other names are passed over."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def old_steps(folder: Path, *, keep: int, current: int) -> list[Path]:
    """The `step-N` folders to remove so that `keep` stay: the oldest, but never the current step's. A run that goes on
    from an earlier checkpoint saves beside later steps, which may be damaged."""
    others = [path for step, path in steps_in(folder).items() if step != current]
    return others[: max(len(others) + 1 - keep, 0)]


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename survives a power cut only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write a file to; once the block is through, the file gets its name. A reader, or a run killed at
    any moment, finds the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(temporary)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a run killed at any moment, finds the old content or the new, never half."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a kill is left out. Empty when there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
