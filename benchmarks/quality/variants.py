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


FULL = {"method": {"name": "full"}, "optimizer.lr": 1e-3}
FULL_BF16 = FULL | {"training.precision": "bf16"}
"""fp32 weights, computed with in bf16."""
TOGETHER = {"training.batch_size": 4}
"""The same batch on two processes."""
ALL_LINEAR = r".*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
OPTIMIZERS = ("adamw_8bit", "torchao_adamw_8bit", "torchao_adamw_4bit", "adafactor", "prodigy", "muon")

VARIANTS = (
    Variant("reference", "LoRA, rank 32, AdamW, lr 4e-3, fp32, one process"),
    *(Variant("rank", f"rank {rank}", {"method.rank": rank}) for rank in (4, 16, 64)),
    *(Variant("learning rate", f"lr {lr:g}", {"optimizer.lr": lr}) for lr in (1e-3, 2e-3, 8e-3)),
    *(Variant("optimizer", name, {"optimizer.name": name}) for name in OPTIMIZERS),
    Variant("precision", "bf16", {"training.precision": "bf16"}),
    *(Variant("base weights", name, {"memory.base_weights": name}) for name in ("int8", "fp8", "nf4")),
    Variant("targets", "attention and feed-forward", {"method.target_modules": ALL_LINEAR}),
    Variant("caption dropout", "none", {"data.caption_dropout": 0.0}),
    Variant("full", "fp32", FULL),
    Variant("full", "bf16 weights", FULL | {"method.weights_dtype": "bf16", "training.precision": "bf16"}),
    Variant("full", "Muon", FULL | {"optimizer.name": "muon"}),
    Variant("float8", "bf16", FULL_BF16),
    *(Variant("float8", name, FULL_BF16 | {"method.float8_recipe": name}) for name in ("tensorwise", "rowwise")),
    Variant("engine", "DDP x 2", TOGETHER | {"parallel.strategy": "ddp"}, 2),
    Variant("engine", "FSDP2 x 2", TOGETHER | {"parallel.strategy": "fsdp"}, 2),
    Variant("engine", "ZeRO 2 x 2", TOGETHER | {"parallel.strategy": "deepspeed", "parallel.zero_stage": 2}, 2),
)
