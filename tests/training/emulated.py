"""CUDA graphs on a CPU: a recorder that, as they do, launches nothing while it records, and then runs the very same
operations on the very same memory, whatever Python would do meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetrainers.memory.simulation import tensors_in

TOLD_TO_THE_HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
"""Operations for which the host waits: a recording on a GPU refuses them."""


class Emulated:
    """A recorder. `outside` are the tensors that the last recording used and did not make, by place in memory."""

    def __init__(self) -> None:
        self.count = 0
        self.outside: dict[int, Tensor] = {}

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.count += 1
        tape = _Tape()
        generator = torch.get_rng_state()
        with tape:
            run()
        torch.set_rng_state(generator)
        tape.undo()
        self.outside = tape.outside
        return tape.replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self.outside: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = list(tensors_in((args, kwargs)))
        assert name not in TOLD_TO_THE_HOST, f"{name} in a pass that is recorded"
        if "lift_fresh" in name:
            # A tensor made of Python's numbers would come from the host; of a single one it is made on the device.
            assert given[0].dim() == 0, "numbers of Python in a pass that is recorded"
            self._made.add(_place(given[0]))
        for tensor in given:
            if _place(tensor) not in self._made:
                self.outside.setdefault(_place(tensor), tensor)
        for tensor in _written(func, args, kwargs):
            if _place(tensor) not in self._made and _place(tensor) not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[_place(tensor)] = whole, whole.clone()
        answer = func(*args, **kwargs)
        self._made |= {_place(tensor) for tensor in tensors_in(answer)} - {_place(tensor) for tensor in given}
        self._operations.append((func, args, kwargs, answer))
        return answer

    def undo(self) -> None:
        """Put back what lay in memory from before, since nothing was to be launched."""
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, answer in self._operations:
            given = {_place(tensor) for tensor in tensors_in((args, kwargs))}
            again = func(*args, **kwargs)
            for new, old in zip(tensors_in(again), tensors_in(answer), strict=True):
                # Views lie in memory that is written by others.
                if _place(old) not in given:
                    old.copy_(new)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[number] if number < len(args) else kwargs.get(argument.name))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
