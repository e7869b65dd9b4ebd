"""From `model.path` to the family that it belongs to: hub id or folder, read from its own `model_index.json`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

from finetrainers import families
from finetrainers.errors import UserError
from finetrainers.families.base import Family

_CONFIGS = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model"]
_WEIGHTS = ["*/*.safetensors"]


def all_families() -> list[type[Family]]:
    """Every family in the package, by name: each module of `families/` that holds one."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    ours = [kind for kind in Family.__subclasses__() if kind.__module__.startswith(f"{families.__name__}.")]
    return sorted(ours, key=lambda kind: kind.name)


def find_family(options: Any, *, vae_tiling: bool = False, weights: bool = True) -> Family:
    """Open the family of the model that the `model` section describes. Raises UserError for a missing model, an unknown
    family, or a task or option that the model has not.

    With `weights=False` only configs are fetched from the hub: enough to plan a run.
    """
    path = options.path
    kinds = [import_family(options.family)] if options.family else all_families()
    folder = resolve_model(path, revision=options.revision, weights=weights)
    try:
        class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except FileNotFoundError:
        raise UserError(
            f"model.path {path}: no model_index.json in it; give a diffusers folder, which has transformer/, vae/, ..."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"model.path {path}: its model_index.json names no `_class_name`, or is not JSON") from None
    if weights:
        hide_loading_bars()
    for kind in kinds:
        if class_name in kind.pipelines:
            return _open(kind, folder, options, vae_tiling=vae_tiling)
    known = "; ".join(f"{kind.name} ({', '.join(kind.pipelines)})" for kind in kinds)
    raise UserError(f"model.path {path} is a {class_name}, which is not supported; supported are: {known}")


def import_family(dotted: str) -> type[Family]:
    """A Family class from outside the package. Raises UserError when there is none of that name."""
    module_name, _, class_name = dotted.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"model.family {dotted}: cannot be imported ({error}); it is package.module.Class, found on PYTHONPATH"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Family)):
        raise UserError(f"model.family {dotted} is no subclass of finetrainers.families.base.Family")
    return kind


def _open(kind: type[Family], folder: Path, options: Any, *, vae_tiling: bool) -> Family:
    """The family on its folder, once all parts are there and all options fit."""
    path, family = options.path, kind(folder, options, vae_tiling=vae_tiling)
    configs = ["transformer", "vae"]
    if missing := [part for part in configs if not (folder / part / "config.json").is_file()]:
        raise UserError(f"model.path {path}: the file {missing[0]}/config.json of a {kind.name} model is missing in it")
    for part in (part for parts in family.parts.values() for part in parts):
        if not (folder / part).is_dir():
            raise UserError(f"model.path {path}: the folder {part}/ of a {kind.name} model is missing in it")
    if family.task not in family.supported_tasks:
        raise UserError(
            f"model.task {family.task!r} is not supported by {path} ({kind.name}); it does: "
            f"{', '.join(family.supported_tasks)}"
        )
    for name in _OPTIONAL - kind.takes:
        if getattr(options, name) is not None:
            takers = [other.name for other in all_families() if name in other.takes]
            raise UserError(f"model.{name} is no option of {kind.name}; it is for {', '.join(takers)}")
    if reason := family.check_options():
        raise UserError(reason)
    rope = options.rope_temporal
    if rope is not None and family.longest is not None and rope.frames <= family.longest:
        raise UserError(
            f"model.rope_temporal.frames {rope.frames} is not beyond the {family.longest} frames that the model was "
            "trained on; leave model.rope_temporal out"
        )
    return family


_OPTIONAL = frozenset({"experts", "embedded_guidance", "learned_positions", "rope_temporal"})
"""Options of the `model` section that only some families have."""


def hide_loading_bars() -> None:
    """No bars for reading and writing local files, which take no time; a download, which does, came before."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


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
