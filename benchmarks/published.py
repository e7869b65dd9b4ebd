"""The published models as folders that say they hold them: configs of their sizes, and no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.families.tiny import TINY


@dataclass(frozen=True)
class Published:
    """One published model."""

    row: str
    """The tiny model whose other parts stand beside the transformer and the VAE."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What its transformer's config has besides the class's own defaults."""

    def write(self, folder: Path) -> Path:
        """Its folder: the published transformer's and VAE's configs, and T5-XXL's width of the text."""
        TINY[self.row].write(folder)
        for part, changes in (("transformer", self.changes), ("vae", {})):
            config = json.loads((folder / part / "config.json").read_text())
            with torch.device("meta"):
                getattr(diffusers, config["_class_name"])(**changes).save_config(folder / part)
        text_config = folder / "text_encoder" / "config.json"
        # T5 and UMT5 say there how wide the text is that the transformer is given.
        text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "d_model": 4096}))
        return folder


_COGVIDEOX = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_COGVIDEOX_1_5 = {
    **_COGVIDEOX,
    **{"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81},
}
PUBLISHED = {
    "LTX-Video 2B": Published("ltx-0.9.0"),
    "CogVideoX-5b": Published("cogvideox-5b", _COGVIDEOX),
    "CogVideoX1.5-5B": Published("cogvideox-1.5", _COGVIDEOX_1_5),
    "HunyuanVideo 13B": Published("hunyuan"),
    "Wan 2.1 1.3B": Published("wan-2.1", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "Wan 2.1 14B": Published("wan-2.1"),
}
