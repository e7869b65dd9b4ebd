"""From `model.path` to the family that it belongs to: hub id or folder, read from its own `model_index.json`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

from finetrainers import families
from finetrainers.errors import UserError
from finetrainers.families.base import Family

_CONFIGS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model"]
_WEIGHTS = ["*/*.safetensors"]


def all_families() -> list[type[Family]]:
    """Every family in the package, by name: each module of `families/` that holds a Family."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    return sorted((kind for kind in Family.__subclasses__() if hasattr(kind, "name")), key=lambda kind: kind.name)


def find_family(
    path: str, *, revision: str | None, task: str, vae_tiling: bool = False, weights: bool = True
) -> Family:
    """Open the family of a model. Raises UserError for a missing model, an unknown family or a task it has not.

    With `weights=False` only configs are fetched from the hub: enough to plan a run.
    """
    folder = resolve_model(path, revision=revision, weights=weights)
    index_file = folder / "model_index.json"
    try:
        index = json.loads(index_file.read_text())
        class_name = index["_class_name"]
    except FileNotFoundError:
        raise UserError(
            f"model.path {path}: no model_index.json in it; give a diffusers folder, which has transformer/, vae/, ..."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"model.path {path}: its model_index.json names no `_class_name`, or is not JSON") from None
    if weights:
        hide_loading_bars()
    kinds = all_families()
    for kind in kinds:
        if class_name in kind.pipelines:
            _check_task(kind, task)
            _check_parts(kind, folder, path)
            return kind(folder, vae_tiling=vae_tiling)
    known = "; ".join(f"{kind.name} ({', '.join(kind.pipelines)})" for kind in kinds)
    raise UserError(f"model.path {path} is a {class_name}, which is not supported; supported are: {known}")


def hide_loading_bars() -> None:
    """No bars for reading and writing local files, which take no time; a download, which does, came before."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _check_task(kind: type[Family], task: str) -> None:
    if task not in kind.tasks:
        raise UserError(f"model.task {task!r} is not supported for {kind.name}; supported are: {', '.join(kind.tasks)}")


def _check_parts(kind: type[Family], folder: Path, path: str) -> None:
    for part in kind.parts.values():
        if not (folder / part).is_dir():
            raise UserError(f"model.path {path}: the folder {part}/ of a {kind.name} model is missing in it")


def resolve_model(path: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model; a hub id is downloaded (only what diffusers reads) or found in the hub's cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise UserError(
            f"model.path {path} does not exist; give a local diffusers folder or a hub id such as org/model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = _CONFIGS + _WEIGHTS if weights else _CONFIGS
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.path {path}: no such folder here, and the hub did not give it: {reason}") from None
