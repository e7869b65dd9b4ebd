"""What variants of one run's config hold in memory, each simulated once."""

from __future__ import annotations

import os

from finetrainers.commands.completing import build_method
from finetrainers.config.load import resolved_buckets, resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.families.base import Family
from finetrainers.training.forecast import (
    Phase,
    Step,
    Work,
    encoding_phases,
    simulate_step,
    simulate_validation,
    training_phases,
)
from finetrainers.types import Bucket, Condition

GIB = 2**30


class Forecaster:
    """Forecasts of a run for its largest size, whose config may change in how memory is saved."""

    def __init__(self, family: Family, config: RunConfig) -> None:
        self._family = family
        self._bucket = max(resolved_buckets(config), key=family.num_tokens)
        self._condition = max(resolved_conditions(config), key=lambda entry: entry[1])[0]
        self._steps: dict[str, Step] = {}
        self._encodings: dict[str, list[Phase]] = {}
        self._validations: dict[str, int | None] = {}

    def peak_gib(self, config: RunConfig) -> float:
        """The most that any phase holds."""
        return max(phase.peak for phase in self.phases(config)) / GIB

    def num_blocks(self, config: RunConfig) -> int:
        """Blocks of the transformer that has the most."""
        step = self._step(config)
        return max(len(step.method.family.blocks(name, model)) for name, model in step.models.items())

    def phases(self, config: RunConfig) -> list[Phase]:
        """Each phase of the run."""
        return [*self._encoding(config), *self._training(config, self._validation(config))]

    def training_gib(self, config: RunConfig) -> float:
        """The most that its steps hold, without what comes before and between them."""
        return self._training(config, None)[0].peak / GIB

    def _training(self, config: RunConfig, validation: int | None) -> list[Phase]:
        return training_phases(
            self._step(config),
            validation,
            memory=config.memory,
            optimizer=config.optimizer,
            shards=num_shards(config),
            keeps=keeps_gradients(config),
            records=config.training.cuda_graphs,
        )

    def _encoding(self, config: RunConfig) -> list[Phase]:
        memory = config.memory
        key = str((memory.vae_tiling, memory.text_encoder_weights, memory.stream_text_encoder))
        if key not in self._encodings:
            self._encodings[key] = encoding_phases(self._work(config), memory=memory)
        return self._encodings[key]

    def _step(self, config: RunConfig) -> Step:
        memory, checkpointing = config.memory, str(config.training.gradient_checkpointing)
        work = self._work(config)
        # Gradients of streamed blocks leave the device as they come, too.
        leave = bool(memory.stream_blocks) and not work.method.saves_trained_only
        release = config.optimizer.in_backward or leave or keeps_gradients(config)
        computed = (checkpointing, memory.offload_activations, memory.base_weights, release)
        key = str((config.method, *computed))
        if key not in self._steps:
            self._steps[key] = simulate_step(work, checkpointing=checkpointing, memory=memory, release=release)
        return self._steps[key]

    def _validation(self, config: RunConfig) -> int | None:
        key = str((config.method, config.memory.base_weights, config.memory.vae_tiling))
        if key not in self._validations:
            self._validations[key] = simulate_validation(self._work(config), memory=config.memory)
        return self._validations[key]

    def _work(self, config: RunConfig) -> Work:
        ours, options = self._family, config.validation
        sampled = Bucket.parse(options.bucket) if options.bucket else resolved_buckets(config)[0]
        return Work(
            method=build_method(type(ours)(ours.folder, ours.options, vae_tiling=config.memory.vae_tiling), config),
            bucket=self._bucket,
            condition=Condition() if self._bucket.num_frames == 1 else self._condition,
            batch_size=config.training.batch_size,
            sampled=sampled if options.every and (options.prompts or options.num_videos) else None,
            validates=bool(options.every),
        )


def keeps_gradients(config: RunConfig) -> bool:
    """Whether gradients are there while a pass of a step begins: those of passes before it, or buffers for them."""
    return config.training.gradient_accumulation_steps > 1 or config.training.cuda_graphs


def num_shards(config: RunConfig) -> int:
    """Among how many processes weights, gradients and optimizer state are shared out."""
    is_shared = config.parallel.strategy in ("fsdp", "deepspeed")
    return int(os.environ.get("WORLD_SIZE", "1")) if is_shared else 1
