"""The options of the `memory` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetrainers.config.section import FREE, Section
from finetrainers.config.values import BudgetText, Count


class MemoryConfig(Section):
    """What stays on the device."""

    budget: BudgetText | None = Field(None, json_schema_extra=FREE)
    """Memory that the run may take, such as `24GB`, or `auto` for what the device has: of the options below, of
    `training.gradient_checkpointing` and of `optimizer` those that are left out are chosen so that it fits. Left out:
    nothing is chosen."""
    on_oom: Literal["stop", "adapt"] = Field("stop", json_schema_extra=FREE)
    """When the device's memory is exhausted in a step: `stop` says what held it and what to change, `adapt` takes the
    next measure that changes no number and repeats the step."""
    vae_tiling: bool = False
    """Encode and decode video in tiles: less memory, slightly different latents."""
    text_encoder_weights: Literal["fp8", "int8", "nf4"] | None = None
    """The same for the text encoder while captions are encoded; these embeddings are cached beside others."""
    stream_text_encoder: bool = Field(False, json_schema_extra=FREE)
    """Keep the layers of text encoders in the host's memory while captions are encoded, and bring each to the device
    when it runs."""
    base_weights: Literal["fp8", "int8", "nf4"] | None = None
    """Low precision of the frozen weights of the blocks' linear layers under `lora`: half of bf16, or a quarter (`nf4`,
    bitsandbytes), at errors of 2.7 (`fp8`), 0.7 and 9 percent. Arithmetic stays as it is. Left out: as they are."""
    keep_quantized: bool = Field(False, json_schema_extra=FREE)
    """Keep the weights in low precision on disk beside the encoded dataset, to begin faster the next time."""
    stream_blocks: Count | Literal["all"] = Field(0, json_schema_extra=FREE)
    """Blocks of the transformer whose weights lie in the host's memory and are brought to the device when they run:
    `all`, or so many, evenly spread. It needs whole blocks to be checkpointed (`training.gradient_checkpointing`)."""
    offload_activations: bool = Field(False, json_schema_extra=FREE)
    """Keep what the blocks save for the backward pass in the host's memory until then."""
