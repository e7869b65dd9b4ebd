"""What a user takes away: a LoRA file or a transformer folder, in diffusers' own format, with a card that says how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetrainers.folder import LORA_FILE, old_steps, step_name


def write_lora(folder: Path, state_dict: Mapping[str, Tensor], peft_config: Mapping[str, Any]) -> Path:
    """Write `pytorch_lora_weights.safetensors` as `Pipeline.load_lora_weights` reads it.

    The adapter's rank and alpha stand in the header: without them a loader takes alpha for the rank, and the LoRA comes
    back at another strength than it was trained at. It is the header's only entry, because safetensors writes several
    in random order, and the same weights shall be the same file.
    """
    tensors = {f"transformer.{name}": tensor.contiguous().cpu() for name, tensor in state_dict.items()}
    described = {f"transformer.{key}": _plain(value) for key, value in peft_config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(described, indent=2, sort_keys=True)}
    save_file(tensors, folder / LORA_FILE, metadata=metadata)
    return folder / LORA_FILE


def write_transformer(folder: Path, state_dict: Mapping[str, Tensor], transformer: Any, dtype: torch.dtype) -> Path:
    """Write `transformer/` as diffusers' `from_pretrained` reads it, in the given type."""
    from huggingface_hub import save_torch_state_dict

    target = folder / "transformer"
    target.mkdir()
    transformer.save_config(target)
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state_dict.items()}
    save_torch_state_dict(tensors, target, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
    return target


def write_card(folder: Path, *, base_model: str, family: str, method: str, step: int, trigger: str) -> None:
    """Write README.md: what this was trained from, and the lines of diffusers that load what lies beside it."""
    if (folder / LORA_FILE).exists():
        load = 'pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")'
    else:
        load = 'pipeline.transformer = type(pipeline.transformer).from_pretrained("PATH_OF_THIS_FOLDER/transformer")'
    front = (
        f"---\nbase_model: {json.dumps(base_model)}\nlibrary_name: diffusers\ntags: [text-to-video, {method}]\n---\n"
    )
    trigger_line = f"\nPut the id token {json.dumps(trigger)} before each prompt.\n" if trigger else ""
    (folder / "README.md").write_text(
        f"{front}\n# {method} weights for {family}\n\nTrained for {step} steps from `{base_model}` with finetrainers.\n"
        f"{trigger_line}\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base_model)})\n{load}\n```\n"
    )


class WeightsFolder:
    """`weights/`: a folder for each saved step, written whole, and `latest` that points at the newest."""

    def __init__(self, root: Path, *, keep: int | None) -> None:
        self.root = root
        self.keep = keep

    def begin(self, step: int) -> Path:
        """An empty folder to write into; it gets its name in `finish`."""
        temporary = self.root / f".{step_name(step)}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def finish(self, temporary: Path, step: int) -> Path:
        """Give the folder its name, point `latest` at it, and prune."""
        final = self.root / step_name(step)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        link = self.root / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self.root / "latest")
        if self.keep is not None:
            for old in old_steps(self.root, keep=self.keep, current=step):
                shutil.rmtree(old)
        return final


def _plain(value: Any) -> Any:
    """A value as JSON has it; sets sorted, so that the file does not depend on their order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
