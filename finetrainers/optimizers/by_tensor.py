"""An optimizer that updates one tensor at a time, which lets its state lie elsewhere, its weights be bf16, and its
gradient go as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers.hashing import seed_for
from finetrainers.optimizers.host_states import HostStates, State, is_large
from finetrainers.optimizers.parts import put_together, take_apart
from finetrainers.optimizers.rounding import round_stochastically

Part = tuple[torch.optim.Optimizer, Sequence[nn.Parameter]]
"""An optimizer built on a stand-in, and the parameters that it is to update."""


class ByTensor(torch.optim.Optimizer):
    """Optimizers of which each sees one fp32 tensor at a time: the parameter, or of a bf16 parameter a copy made for
    the moment, whose update is rounded back at random. So what they compute is what they would compute of fp32 weights,
    tensor by tensor.

    Its groups are theirs, and so is its state, as plain tensors: a checkpoint of it is one of the optimizer itself,
    wherever the state lies.
    """

    def __init__(self, parts: Sequence[Part], names: Mapping[str, nn.Parameter], *, seed: int, offload: bool) -> None:
        super().__init__([{**inner.defaults, "params": list(of)} for inner, of in parts], {})
        self._inner = [inner for inner, _ in parts]
        self._part_of = {parameter: number for number, (_, of) in enumerate(parts) for parameter in of}
        self._names = {parameter: name for name, parameter in names.items()}
        self._seed = seed
        device = next(iter(names.values())).device
        self._host = HostStates(device, self.state) if offload else None
        self._generator = torch.Generator(device)
        if any(parameter.dtype != torch.float32 for parameter in names.values()):
            # In a group because that is what a checkpoint keeps besides the state.
            self.param_groups[0]["rounded_steps"] = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that it updates, in the order of its groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update each tensor that has a gradient."""
        assert closure is None
        for parameter in self.parameters:
            if parameter.grad is not None:
                self.update(parameter)
        self._count()

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """Apply the gradient of one tensor."""
        assert parameter.grad is not None
        number = self._part_of[parameter]
        inner = self._inner[number]
        shell = parameter
        if parameter.dtype != torch.float32:
            shell = nn.Parameter(parameter.float())
            shell.grad = parameter.grad.float()
        is_first = not self.state[parameter]
        state = self.state[parameter] if self._host is None or is_first else self._host.bring(parameter)
        _hand_over(inner, shell, state, lr=self.param_groups[number]["lr"])
        inner.step()
        state = take_apart(inner.state.pop(shell))
        inner.param_groups[0]["params"] = []
        if self._host is None:
            self.state[parameter] = state
        elif is_first:
            self._host.adopt(parameter, state)
        else:
            self._host.store(parameter, state)
        if shell is not parameter:
            shell.grad = None
            step = self.param_groups[0]["rounded_steps"]
            self._generator.manual_seed(seed_for(self._seed, "rounding", step, self._names[parameter]))
            parameter.copy_(round_stochastically(shell, self._generator))

    def _count(self) -> None:
        if "rounded_steps" in self.param_groups[0]:
            self.param_groups[0]["rounded_steps"] += 1

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of the state as it is now."""
        if self._host is not None:
            self._host.settle()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but for the types of the state, which stay, and its place, which is the device or the host."""
        parameters = self.parameters
        self.state.clear()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        placed: dict[int, Tensor] = {}
        for index, state in state_dict["state"].items():
            parameter = parameters[index]
            inner, here = self._inner[self._part_of[parameter]], dict(state)
            for key, value in state.items():
                if self._host is None or not is_large(value):
                    here[key] = _place(key, value, parameter, inner, placed)
            if self._host is not None:
                self._host.adopt(parameter, here)
            else:
                self.state[parameter] = here


class InBackward(ByTensor):
    """Updates each tensor in the backward pass, as soon as its gradient is complete, and drops the gradient: those of
    the whole model never exist at once. `step` has nothing left to do."""

    def __init__(self, parts: Sequence[Part], names: Mapping[str, nn.Parameter], *, seed: int, offload: bool) -> None:
        super().__init__(parts, names, seed=seed, offload=offload)
        self._norms: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._apply)

    def _apply(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        self._norms[parameter] = torch._foreach_norm([parameter.grad], 2, torch.float32)[0]
        self.update(parameter)
        parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Note that the step is over."""
        assert closure is None
        self._count()

    def take_norms(self) -> list[Tensor]:
        """The norm of each gradient of the step, in the order of the parameters."""
        norms = [self._norms[parameter] for parameter in self.parameters if parameter in self._norms]
        self._norms.clear()
        return norms


def _hand_over(inner: torch.optim.Optimizer, shell: nn.Parameter, state: State, *, lr: float) -> None:
    """Make a tensor the only one that an optimizer has."""
    group = inner.param_groups[0]
    group["params"] = [shell]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
    inner.state[shell] = put_together(state, shell.shape)


def _place(name: str, value: Any, parameter: nn.Parameter, inner: Any, placed: dict[int, Tensor]) -> Any:
    """A part of a state that was loaded, where the optimizer had it; a tensor that several states share is shared
    again."""
    if not isinstance(value, Tensor):
        return value
    if getattr(inner, "is_paged", False) and value.shape == parameter.shape:
        # Only memory that bitsandbytes gave itself can be paged.
        return inner.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    # Steps are counted on the host but where one kernel does all. A count that moved would give other last digits.
    counts_here = name == "step" and not inner.defaults.get("fused", False)
    return placed.setdefault(id(value), value if counts_here else value.to(parameter.device))
