"""The published models as folders that say they hold them: configs of their sizes, and no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from finetrainers.commands.completing import complete
from finetrainers.config.load import build_config
from finetrainers.config.schema import RunConfig
from finetrainers.families.base import Family
from tests.families.tiny import TINY


@dataclass(frozen=True)
class Published:
    """One published model."""

    row: str
    """The tiny model whose other parts stand beside the transformer and the VAE."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What its transformer's config has besides the class's own defaults."""

    def write(self, folder: Path) -> Path:
        """Its folder: the published configs of transformer, VAE and text encoder."""
        TINY[self.row].write(folder)
        for part, changes in (("transformer", self.changes), ("vae", {})):
            config = json.loads((folder / part / "config.json").read_text())
            with torch.device("meta"):
                getattr(diffusers, config["_class_name"])(**changes).save_config(folder / part)
        text_config = folder / "text_encoder" / "config.json"
        config = json.loads(text_config.read_text())
        text_config.write_text(json.dumps({**config, **_TEXT_ENCODERS[config["model_type"]]}))
        return folder


def open_published(model: Published, size: str, folder: Path, **sections: Any) -> tuple[Family, RunConfig]:
    """The family of a published model that is written to `folder`, and the whole config of a run of one size of clips;
    `sections` are more of the config."""
    settings = {
        "model": {"path": str(model.write(folder / "model"))},
        "data": {"train": str(folder), "buckets": [size]},
        "output": str(folder),
    }
    return complete(build_config(settings | sections), weights=False)


_T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
_TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "t5": {**_T5_XXL, "vocab_size": 32128},
    "umt5": {**_T5_XXL, "vocab_size": 256384},
    "llama": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128320},
    },
}


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
