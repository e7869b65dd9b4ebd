"""From the `optimizer` section to an optimizer, and what is refused of it before anything slow."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from finetrainers.errors import UserError
from finetrainers.optimizers.by_tensor import ByTensor, InBackward, Part
from finetrainers.optimizers.kinds import KINDS, Kind


def check_optimizer(
    options: Any, training: Any, *, weights_dtype: str | None = None, shares: bool = False, num_processes: int = 1
) -> None:
    """Refuse an optimizer that cannot do what it is asked for, from the config's `optimizer` and `training` sections
    and `method.weights_dtype`; `shares` says that processes share the weights and the state."""
    kind, name = KINDS[options.name], options.name
    if kind.module and find_spec(kind.module) is None:
        raise UserError(f"optimizer.name {name} needs {kind.module}: pip install 'finetrainers[{kind.extra}]'")
    for key in ("betas", "eps"):
        if key not in kind.takes and getattr(options, key) is not None:
            raise UserError(f"optimizer.{key} is not used by {name}: leave it out")
    if options.lr == 0 and not kind.alone:
        raise UserError(f"optimizer.lr 0 is not taken by {name}: for a run that moves nothing take adamw")
    if shares and not kind.can_be_shared:
        raise UserError(
            f"optimizer.name {name} keeps its state whole on each process: take adamw, whose state fsdp and deepspeed "
            "share, or parallel.strategy ddp"
        )
    for option in _by_tensor(options, weights_dtype):
        if shares:
            raise UserError(
                f"{option} needs each process to hold whole weights, which fsdp and deepspeed share: take "
                "parallel.offload, or parallel.strategy ddp"
            )
        if not kind.alone:
            raise UserError(
                f"{option} updates one tensor at a time, and {name} sets its step size by all of them: take another "
                "optimizer.name"
            )
    if options.offload and kind.pages:
        raise UserError(f"optimizer.offload is not needed with {name}, whose state moves to the host by itself")
    if weights_dtype == "bf16" and training.precision != "bf16":
        raise UserError("method.weights_dtype bf16 computes in bf16: set training.precision to bf16")
    if options.in_backward:
        _check_in_backward(training, num_processes)


def can_be_shared(options: Any, weights_dtype: str | None) -> bool:
    """Whether processes may share the state of the optimizer that the `optimizer` section asks for."""
    return KINDS[options.name].can_be_shared and not _by_tensor(options, weights_dtype)


def _by_tensor(options: Any, weights_dtype: str | None) -> list[str]:
    """What is asked for that needs tensors to be updated one at a time, and whole."""
    asked = {
        "optimizer.offload": options.offload,
        "optimizer.in_backward": options.in_backward,
        "method.weights_dtype bf16": weights_dtype == "bf16",
    }
    return [option for option, is_asked in asked.items() if is_asked]


def _check_in_backward(training: Any, num_processes: int) -> None:
    """What needs all gradients of a step together cannot be had where each is gone before the next one comes."""
    if num_processes > 1:
        raise UserError(
            "optimizer.in_backward applies gradients before processes have made them one: leave it out, or run in one "
            "process"
        )
    if training.gradient_accumulation_steps > 1:
        raise UserError(
            "optimizer.in_backward keeps no gradient until the next batch: set training.gradient_accumulation_steps to "
            "1 and raise training.batch_size"
        )
    if training.max_grad_norm > 0:
        raise UserError(
            "optimizer.in_backward applies each gradient before the norm of all of them is known, so that it cannot be "
            "clipped: set training.max_grad_norm to 0"
        )


def build_optimizer(trained: Mapping[str, nn.Parameter], options: Any, *, seed: int) -> torch.optim.Optimizer:
    """The optimizer over the parameters that move, by name; `options` are the config's `optimizer` section, filled in.
    `seed` fixes how weights in bf16 are rounded."""
    kind = KINDS[options.name]
    parameters = list(trained.values())
    is_fp32 = all(parameter.dtype == torch.float32 for parameter in parameters)
    if kind.at_once and is_fp32 and not (options.offload or options.in_backward):
        return kind.build(parameters, _settings(kind, options))
    matrices = [parameter for parameter in parameters if parameter.ndim == 2 or not kind.matrices_only]
    others = [parameter for parameter in parameters if parameter.ndim != 2 and kind.matrices_only]
    parts: list[Part] = []
    for its_kind, of in ((kind, matrices), (KINDS["adamw"], others)):
        if of:
            stand_in = nn.Parameter(torch.empty(1, 1, device=of[0].device))
            parts.append((its_kind.build([stand_in], _settings(its_kind, options)), of))
    made = InBackward if options.in_backward else ByTensor
    return made(parts, trained, seed=seed, offload=options.offload)


def _settings(kind: Kind, options: Any) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("lr", *kind.takes)}
