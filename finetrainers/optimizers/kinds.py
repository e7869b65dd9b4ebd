"""The optimizers by name: what each is built from, what it needs installed, and which options it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Settings = Mapping[str, Any]
"""The learning rate, and of `betas`, `eps` and `weight_decay` those that the optimizer takes."""


@dataclass(frozen=True)
class Kind:
    """One value of `optimizer.name`."""

    build: Callable[[Sequence[nn.Parameter], Settings], torch.optim.Optimizer]
    extra: str | None = None
    """What of finetrainers' extras must be installed, which has the name of its package."""
    module: str | None = None
    """What that package is imported as."""
    takes: tuple[str, ...] = ("betas", "eps", "weight_decay")
    lr: float | None = None
    """The learning rate that makes sense for it; None is what the model's family says, which was found with AdamW."""
    at_once: bool = False
    """Updates all tensors in one call, because that is faster or because they depend on each other."""
    alone: bool = True
    """Whether a tensor's update depends on that tensor alone, so that it may be done at any moment of the step."""
    can_be_shared: bool = False
    """Whether processes may each hold a share of a tensor and of its state."""
    matrices_only: bool = False
    """Whether what is not a matrix is left to AdamW."""
    pages: bool = False
    """Whether its state moves to the host's memory by itself."""


def _adamw(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # Fused: one kernel for all parameters, three times less time per step than the foreach version.
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _adamw_8bit(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **settings)


def _paged_adamw_8bit(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, **settings)


def _torchao_adamw_8bit(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **settings)


def _torchao_adamw_4bit(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from torchao.optim import AdamW4bit

    return AdamW4bit(parameters, **settings)


def _adafactor(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # transformers', because torch's always multiplies the learning rate by the size of the weights, of which a LoRA's
    # are zero when it begins, and asks the device for three numbers a tensor. Set so, its learning rate is AdamW's.
    from transformers import Adafactor

    return Adafactor(parameters, scale_parameter=False, relative_step=False, **settings)


def _prodigy(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    optimizer = Prodigy(parameters, **{**settings, "weight_decay": 0.0})
    for group in optimizer.param_groups:
        # Given at once it would be announced on standard output.
        group["weight_decay"] = settings["weight_decay"]
    return optimizer


def _muon(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # Scaled so that updates are as large as AdamW's (arXiv 2502.16982): its learning rate and weight decay serve.
    taken = {name: settings[name] for name in ("lr", "weight_decay")}
    return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **taken)


KINDS = {
    "adamw": Kind(_adamw, at_once=True, can_be_shared=True),
    "adamw_8bit": Kind(_adamw_8bit, "bitsandbytes", "bitsandbytes"),
    "paged_adamw_8bit": Kind(_paged_adamw_8bit, "bitsandbytes", "bitsandbytes", pages=True),
    "torchao_adamw_8bit": Kind(_torchao_adamw_8bit, "torchao", "torchao"),
    "torchao_adamw_4bit": Kind(_torchao_adamw_4bit, "torchao", "torchao"),
    "adafactor": Kind(_adafactor, takes=("weight_decay",)),
    "prodigy": Kind(_prodigy, "prodigy", "prodigyopt", lr=1.0, at_once=True, alone=False),
    "muon": Kind(_muon, matrices_only=True),
}

_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def defaults(name: str) -> dict[str, Any]:
    """What the options of `optimizer` that are left out become, as `optimizer.KEY`; those that stay with the family are
    not among them."""
    kind = KINDS[name]
    values = {key: value for key, value in _DEFAULTS.items() if key in kind.takes}
    values |= {} if kind.lr is None else {"lr": kind.lr}
    return {f"optimizer.{key}": value for key, value in values.items()}
