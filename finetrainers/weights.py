"""What a user takes away: a LoRA file or a transformer folder, in diffusers' own format, with a card that says how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetrainers.folder import LORA_FILE, old_steps, step_name

Adapters = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Weights of the adapters of one model, and their peft config."""

SECOND = "transformer_2"
"""Folder of the second of two experts, in a model and among the weights alike."""
NOTES = ("learned_positions", "rope_temporal")
"""Options of `model` that trained weights may carry, because the model is wrong for them without."""
_NOTES = "finetrainers"
"""Prefix of what the weights say about themselves; loaders read what stands under the name of a model only."""


def write_loras(folder: Path, adapters: Mapping[str, Adapters], *, notes: Mapping[str, Any]) -> None:
    """Write `pytorch_lora_weights.safetensors` as `Pipeline.load_lora_weights` reads it, with all models in it; but the
    second expert's in a file of its own under `transformer_2/`, as diffusers loads it by itself.

    `notes` say what else must be set when the weights are used; `read_notes` gives them back.
    """
    together = {part: adapter for part, adapter in adapters.items() if part != SECOND}
    if together:
        _write_lora(folder, together, notes)
    if SECOND in adapters:
        (folder / SECOND).mkdir()
        # Loaders ask for the prefix `transformer` whichever expert they load into.
        _write_lora(folder / SECOND, {"transformer": adapters[SECOND]}, notes)


def _write_lora(folder: Path, adapters: Mapping[str, Adapters], notes: Mapping[str, Any]) -> None:
    """One LoRA file.

    The adapters' rank and alpha stand in the header: without them a loader takes alpha for the rank, and the LoRA comes
    back at another strength than it was trained at. It is the header's only entry, because safetensors writes several
    in random order, and the same weights shall be the same file.
    """
    tensors: dict[str, Tensor] = {}
    described = {f"{_NOTES}.{key}": _plain(value) for key, value in notes.items()}
    for part, (weights, config) in adapters.items():
        tensors |= {f"{part}.{name}": tensor.contiguous().cpu() for name, tensor in weights.items()}
        described |= {f"{part}.{key}": _plain(value) for key, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(described, indent=2, sort_keys=True)}
    save_file(tensors, folder / LORA_FILE, metadata=metadata)


def write_transformer(
    folder: Path, state_dict: Mapping[str, Tensor], transformer: Any, *, notes: Mapping[str, Any]
) -> None:
    """Write a model's folder as diffusers' `from_pretrained` reads it. `notes` go into its config.json under names that
    diffusers passes over."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    transformer.save_config(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {f"_{_NOTES}.{key}": _plain(value) for key, value in notes.items()}
    config["_class_name"] = _class_name(transformer)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_torch_state_dict(dict(state_dict), folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")


def _class_name(model: Any) -> str:
    """The class that a model was built as; sharding puts one of its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def read_notes(weights: Path) -> dict[str, Any]:
    """What weights say about themselves: of a LoRA file, or of a transformer's folder; empty if another tool wrote
    them."""
    if weights.is_dir():
        found = json.loads((weights / "config.json").read_text())
        prefix = f"_{_NOTES}."
    else:
        with safe_open(weights, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        prefix = f"{_NOTES}."
    # Files come from anywhere: nothing else of what they say is ever made an option.
    return {name: found[f"{prefix}{name}"] for name in NOTES if f"{prefix}{name}" in found}


def write_card(folder: Path, *, base_model: str, family: str, task: str, method: str, step: int, trigger: str) -> None:
    """Write README.md: what this was trained from, the lines of diffusers that load what lies beside it, and what these
    lines cannot set."""
    front = f"---\nbase_model: {json.dumps(base_model)}\nlibrary_name: diffusers\ntags: [{task}, {method}]\n---\n"
    trigger_line = f"\nPut the id token {json.dumps(trigger)} before each prompt.\n" if trigger else ""
    (folder / "README.md").write_text(
        f"{front}\n# {method} weights for {family}\n\nTrained for {step} steps from `{base_model}` with finetrainers.\n"
        f"{trigger_line}{_noted(folder)}\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base_model)})\n{''.join(_loading(folder))}```\n"
    )


def _noted(folder: Path) -> str:
    """What the weights in a folder say that these lines of diffusers cannot set; empty if nothing."""
    files = [*folder.glob(f"**/{LORA_FILE}"), *(config.parent for config in folder.glob("transformer*/config.json"))]
    notes = next((notes for path in files if (notes := read_notes(path))), None)
    if notes is None:
        return ""
    return f"\nTrained with {json.dumps(notes)}: a plain pipeline does not know of it, `finetrainers sample` does.\n"


def _loading(folder: Path) -> Iterator[str]:
    """The lines that load each of the weights in a folder."""
    if (folder / LORA_FILE).exists():
        yield 'pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")\n'
        with safe_open(folder / LORA_FILE, framework="pt") as file:
            if any(key.startswith("text_encoder.") for key in file.keys()):  # noqa: SIM118 - not a dict
                yield _LOAD_TEXT_ENCODER
    if (folder / SECOND / LORA_FILE).exists():
        yield f'pipeline.load_lora_weights("PATH_OF_THIS_FOLDER/{SECOND}", load_into_transformer_2=True)\n'
    for part in ("transformer", SECOND):
        if (folder / part / "config.json").exists():
            yield f'pipeline.{part} = type(pipeline.{part}).from_pretrained("PATH_OF_THIS_FOLDER/{part}")\n'


_LOAD_TEXT_ENCODER = f"""
# The text encoder was trained too; its adapters lie in the same file.
import json
from peft import LoraConfig
from safetensors import safe_open

with safe_open("PATH_OF_THIS_FOLDER/{LORA_FILE}", framework="pt") as file:
    described = json.loads(file.metadata()["lora_adapter_metadata"])
    adapters = {{key[13:]: file.get_tensor(key) for key in file.keys() if key.startswith("text_encoder.")}}
options = {{key[13:]: value for key, value in described.items() if key.startswith("text_encoder.")}}
pipeline.text_encoder.load_adapter(adapter_state_dict=adapters, peft_config=LoraConfig(**options))
"""


def load_text_encoder_lora(text_encoder: Any, file: Path, *, scale: float) -> None:
    """Put the adapters of a text encoder beside its weights, at a strength; nothing happens if the file holds none."""
    from peft import LoraConfig

    prefix = "text_encoder."
    with safe_open(file, framework="pt") as opened:
        described = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        keys = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a dict
        adapters = {key.removeprefix(prefix): opened.get_tensor(key) for key in keys}
    if not adapters:
        return
    options = {key.removeprefix(prefix): value for key, value in described.items() if key.startswith(prefix)}
    text_encoder.load_adapter(adapter_state_dict=adapters, peft_config=LoraConfig(**options))
    for module in text_encoder.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", scale)


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
