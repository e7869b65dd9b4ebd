"""Folders that say they hold a published model; nothing of its size is ever built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.families.tiny import TINY


def write_full_size(row: str, changes: dict[str, Any], folder: Path) -> None:
    """A tiny model's folder with the published transformer's config in it, which differs from its class's own defaults
    by `changes`, and T5-XXL's width of the text."""
    TINY[row].write(folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        getattr(diffusers, config["_class_name"])(**changes).save_config(folder / "transformer")
    text_config = folder / "text_encoder" / "config.json"
    # T5 and UMT5 say there how wide the text is that the transformer is given.
    text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "d_model": 4096}))
