"""What a result must say of where it was measured: hardware, versions, command."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, and print it."""
    text = json.dumps(record, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, versions and the command that was run."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    spec = sys.modules["__main__"].__spec__
    script = [sys.argv[0]] if spec is None else ["-m", spec.name]
    packages = ("torch", "diffusers", "transformers", "peft", "av", "safetensors")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python", *script, *sys.argv[1:]]),
    }
