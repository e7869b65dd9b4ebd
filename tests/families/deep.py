"""Tiny models with more blocks, for what happens between one block and the next."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from finetrainers.families.parts import build_network
from tests.families.tiny import TINY


def write_deep(name: str, folder: Path, *, num_layers: int = 5) -> Path:
    """The tiny model of a row, its transformers with so many blocks; of two kinds where there are two, fewer of the
    second."""
    folder = TINY[name].write(folder)
    for part in ("transformer", "transformer_2"):
        path = folder / part / "config.json"
        if not path.exists():
            continue
        config = json.loads(path.read_text())
        config["num_layers"] = num_layers
        if "num_single_layers" in config:
            config["num_single_layers"] = num_layers - 1
        path.write_text(json.dumps(config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(part))
            network = build_network(config["_class_name"], folder, part)
        for file in (folder / part).glob("*.safetensors*"):
            file.unlink()
        network.save_pretrained(folder / part)
    return folder
