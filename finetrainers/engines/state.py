"""What is trained and its optimizer's state on disk, through torch.distributed.checkpoint: written while training goes
on, each process its share, as safetensors; read back by any number of processes, whether they hold shards or all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from finetrainers.errors import UserError

# torch.distributed.checkpoint is imported where it is used: it takes a second, and most commands save nothing.
# It is asked to run in one process where there is one, and says so each time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_TRAINED = "trained/"
_OPTIMIZER = "optimizer.json"
_FILE_BYTES = 2**28
"""Of the tensors that are put together in one file."""


def save(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    *,
    is_main: bool,
    group: Any,
) -> Callable[[], None]:
    """Copy the state to the CPU, and begin to write it into a folder that exists. `group` is the processes that save,
    over gloo; None is this one alone.

    What is returned waits until all of them have written, and raises what went wrong on any.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    shelf = _Shelf()
    described = {name: shelf.split(value, name) for name, value in optimizer.state_dict().items()}
    if is_main:
        (folder / _OPTIMIZER).write_text(json.dumps(described))
    tensors = {f"{_TRAINED}{name}": parameter.detach() for name, parameter in trained.items()} | shelf.tensors
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    begun = async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    writing = cast("Future[Any]", begun)

    def wait() -> None:
        try:
            writing.result()
        except CheckpointException as error:
            ((first, _), *_) = error.failures.values()
            raise first from None

    return wait


def _files(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file, from 1, that each tensor goes to. A file is put together in memory before it is written,
    so that one for all would take the state's memory again."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > _FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + nbytes
    return numbers


def load(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, folder: Path, *, group: Any) -> None:
    """Read the state back in place, each process what it holds of it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UserError(f"{folder} holds a file that is not safetensors ({error}); remove {folder.parent}") from None
    parameters = [parameter for group_ in optimizer.param_groups for parameter in group_["params"]]
    tensors = {f"{_TRAINED}{name}": parameter.detach() for name, parameter in trained.items()}
    tensors |= {path: _room(path, entry, parameters) for path, entry in found.items() if path not in tensors}
    read(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    described = json.loads((folder / _OPTIMIZER).read_text())
    optimizer.load_state_dict({name: _join(value, tensors) for name, value in described.items()})


def _room(path: str, entry: Any, parameters: list[nn.Parameter]) -> torch.Tensor:
    """A tensor to read an entry of the optimizer's state into, such as `state/17/exp_avg`: sharded as the parameter is
    that it is of, and else on the CPU, since the optimizer knows best where it belongs."""
    words = path.split("/")
    if words[0] == "state" and entry.size == (parameter := parameters[int(words[1])]).shape:
        device = parameter.device if hasattr(parameter, "placements") else "cpu"
        return torch.zeros_like(parameter, dtype=entry.properties.dtype, device=device, requires_grad=False)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


class _Shelf:
    """Tensors taken out of a nested state, each under its path; one that stands in several places is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._paths: dict[int, str] = {}

    def split(self, value: Any, path: str) -> Any:
        """The state as JSON, its tensors put on the shelf, such as `state/17/exp_avg`."""
        if isinstance(value, torch.Tensor):
            path = self._paths.setdefault(id(value), path)
            self.tensors.setdefault(path, value)
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, self.split(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [self.split(item, f"{path}/{number}") for number, item in enumerate(value)]}
        return value


def _join(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What a shelf took apart; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {key: _join(item, tensors) for key, item in value["dict"]}
    return [_join(item, tensors) for item in value["list"]]
