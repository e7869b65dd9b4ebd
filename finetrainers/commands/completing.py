"""The config made whole by its model's family, and refused where its options do not fit the model or each other."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from finetrainers.config.load import fill_defaults, resolved_buckets, resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.families.find import all_families, find_family
from finetrainers.memory.quantized import check_format
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.optimizers.kinds import defaults as optimizer_defaults
from finetrainers.types import Bucket, Condition

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def complete(config: RunConfig, *, weights: bool = True) -> tuple[Family, RunConfig]:
    """The family of the config's model, and the config with the defaults of family and optimizer put in and its sizes
    checked."""
    family = find_family(config.model, vae_tiling=config.memory.vae_tiling, weights=weights)
    config = fill_defaults(config, family.defaults(config.method.name) | optimizer_defaults(config.optimizer.name))
    check_sizes(family, config)
    check_context(family, config)
    check_weights(config)
    check_arithmetic(config)
    return family, config


def build_method(family: Family, config: RunConfig) -> Method:
    """The method that a whole config asks for, on its family and objective."""
    objective = build_objective(
        config.objective, alphas_cumprod=family.alphas_cumprod(), noise_range=family.noise_range
    )
    return find_method(config.method, family, objective, dtype=DTYPES[config.training.precision])


def check_sizes(family: Family, config: RunConfig) -> None:
    """Refuse buckets that the model cannot take and conditions that it cannot be given, saying why and what is near."""
    for key, bucket, conditions in _sizes(config):
        if reason := family.check_bucket(bucket):
            raise UserError(f"{key} {bucket}: {reason}")
        for condition in conditions:
            if reason := family.check_condition(condition, bucket):
                raise UserError(f"data.conditions {condition} with {key} {bucket}: {reason}")


def check_context(family: Family, config: RunConfig) -> None:
    """Refuse to split tokens over processes where the model cannot, or where heads or tokens do not divide."""
    key, size = "parallel.context_parallel_size", config.parallel.context_parallel_size
    if size == 1:
        return
    if not family.context_plan():
        able = " and ".join(kind.name for kind in all_families() if kind.context_plan())
        raise UserError(f"{key} {size}: the tokens of {able} can be split over processes, not of {family.name}; set 1")
    heads = int(family.config("transformer")["num_attention_heads"])
    counts = {f"{heads} attention heads of the model": heads}
    for name, bucket, conditions in _sizes(config):
        for condition in conditions:
            length = family.sequence_length(bucket, condition)
            counts[f"{length:,} video tokens of {name} {bucket} with {condition} given"] = length
    if undivided := next((what for what, count in counts.items() if count % size), None):
        fitting = [str(n) for n in range(1, heads + 1) if not any(count % n for count in counts.values())]
        raise UserError(f"{key} {size} does not divide the {undivided}; with these sizes take {' or '.join(fitting)}")


def check_weights(config: RunConfig) -> None:
    """Refuse low precision for weights that move or are shared out, and a format that is not installed."""
    memory, strategy = config.memory, config.parallel.strategy
    base, text = (f"memory.{name}_weights {getattr(memory, f'{name}_weights')}" for name in ("base", "text_encoder"))
    if memory.base_weights and config.method.name == "full":
        raise UserError(f"{base} is for weights that stay as they are: take method.name lora, or leave it out")
    if memory.base_weights and strategy in ("fsdp", "deepspeed"):
        raise UserError(
            f"{base} leaves each process the whole model, and {strategy} shares it out: take parallel.strategy ddp, or "
            "leave it out"
        )
    if memory.text_encoder_weights and getattr(config.method, "text_encoder", "frozen") == "lora":
        raise UserError(
            f"{text} is for captions that are encoded once, and method.text_encoder lora embeds them in every step: "
            "leave one out"
        )
    check_format("memory.base_weights", memory.base_weights)
    check_format("memory.text_encoder_weights", memory.text_encoder_weights)


def check_arithmetic(config: RunConfig) -> None:
    """Refuse float8 where torchao is not installed, and beside fp32."""
    if (recipe := getattr(config.method, "float8_recipe", None)) is None:
        return
    if find_spec("torchao") is None:
        raise UserError(f"method.float8_recipe {recipe} needs torchao: pip install 'finetrainers[torchao]'")
    if config.training.precision != "bf16":
        raise UserError(
            f"method.float8_recipe {recipe} is coarser than training.precision {config.training.precision}, in which "
            "all else would compute: set training.precision bf16, or leave it out"
        )


def _sizes(config: RunConfig) -> list[tuple[str, Bucket, list[Condition]]]:
    """Each size of clips and sample videos: the option that names it, and which frames are given."""
    named = [("data.buckets", bucket) for bucket in resolved_buckets(config)]
    if config.validation.bucket:
        named.append(("validation.bucket", Bucket.parse(config.validation.bucket)))
    conditions = [condition for condition, _ in resolved_conditions(config)]
    # A still image among clips is trained on with nothing given, where the model can.
    still = [Condition()] if Condition() in conditions else conditions
    return [(key, bucket, still if bucket.num_frames == 1 else conditions) for key, bucket in named]
