"""The runs that are compared: each changes one thing of the demo's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One run."""

    group: str
    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1


def lora(group: str, name: str, **overrides: Any) -> Variant:
    return Variant(group, name, {key.replace("__", "."): value for key, value in overrides.items()})


def full(name: str, **overrides: Any) -> Variant:
    """Every weight; what only a LoRA has is left out of the config by `method`."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return Variant("full", name, {"method": {"name": "full"}, "optimizer.lr": 1e-3, **given})


def together(name: str, strategy: str, **overrides: Any) -> Variant:
    """The same batch on two processes."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return Variant("engine", name, {"parallel.strategy": strategy, "training.batch_size": 4, **given}, 2)


VARIANTS = (
    lora("reference", "LoRA, rank 32, AdamW, lr 4e-3, fp32, one process"),
    *(lora("rank", f"rank {rank}", method__rank=rank) for rank in (4, 16, 64)),
    *(lora("learning rate", f"lr {lr:g}", optimizer__lr=lr) for lr in (1e-3, 2e-3, 8e-3)),
    *(
        lora("optimizer", name, optimizer__name=name)
        for name in ("adamw_8bit", "torchao_adamw_8bit", "torchao_adamw_4bit", "adafactor", "prodigy", "muon")
    ),
    lora("precision", "bf16", training__precision="bf16"),
    *(lora("base weights", name, memory__base_weights=name) for name in ("int8", "fp8", "nf4")),
    lora("targets", "attention and feed-forward", method__target_modules=r".*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"),
    lora("caption dropout", "none", data__caption_dropout=0.0),
    full("fp32"),
    full("bf16 weights", method={"name": "full", "weights_dtype": "bf16"}, training__precision="bf16"),
    full("Muon", optimizer__name="muon"),
    together("DDP x 2", "ddp"),
    together("FSDP2 x 2", "fsdp"),
    together("ZeRO 2 x 2", "deepspeed", parallel__zero_stage=2),
)
