"""From `memory.budget` to the options that fit it: of the measures that save memory the first, in the order of what
they cost, and no more of them than needed."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from typing import Any

from finetrainers.config.load import resolved_buckets, resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.families.base import Family
from finetrainers.memory.report import device_gib
from finetrainers.training.forecast import Phase, Step, Work, encoding_phases, simulate_step, training_phases
from finetrainers.types import Bucket, Condition

logger = logging.getLogger(__name__)

GIB = 2**30
CONTEXT_GIB = 0.6
"""What CUDA and its libraries hold besides what is asked of them."""
SPLIT_SHARE = 0.04
"""Of the rest, what is lost between tensors: the allocator hands out whole blocks."""


@dataclass(frozen=True)
class Measure:
    """An option whose value saves memory."""

    option: str
    value: Any
    cost: str
    """What one pays for it."""
    methods: tuple[str, ...] = ("lora", "full")
    shared: bool = False
    """Whether it also works where processes share the weights (fsdp, deepspeed)."""
    package: str | None = None
    """What must be installed for it."""


TRAINING = (
    Measure("training.gradient_checkpointing", "every-2", "a sixth more work", shared=True),
    Measure("training.gradient_checkpointing", "full", "a third more work", shared=True),
    Measure("memory.offload_activations", True, "copies that mostly hide behind the work", shared=True),
    Measure("optimizer.offload", True, "copies of the state in every step"),
    Measure("memory.stream_blocks", "all", "copies of the weights in every pass, hidden where a block takes longer"),
    Measure("optimizer.name", "adamw_8bit", "numbers a little different", package="bitsandbytes"),
    Measure("method.weights_dtype", "bf16", "numbers a little different", methods=("full",)),
    Measure("memory.base_weights", "fp8", "numbers different, and weights made whole in every pass", methods=("lora",)),
    Measure("memory.base_weights", "nf4", "numbers more different", methods=("lora",), package="bitsandbytes"),
)
"""For a step, in the order in which they are taken: first what changes no number, then what does."""
ENCODING = (
    Measure("memory.stream_text_encoder", True, "slower encoding of captions, once", shared=True),
    Measure("memory.vae_tiling", True, "latents a little different", shared=True),
)
"""For encoding and for sample videos."""
NOTHING = {"training.gradient_checkpointing": "none"}
"""Where the search begins: the options whose defaults save memory already."""


@dataclass(frozen=True)
class Chosen:
    """A measure that was taken, and what it did to the peak."""

    option: str
    value: Any
    cost: str
    before_gib: float
    after_gib: float


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, and whether that fits."""

    phases: list[Phase]
    budget_gib: float | None
    """What may be held: the budget less what cannot be used of it."""
    chosen: list[Chosen]

    @property
    def peak_gib(self) -> float:
        return max(phase.peak for phase in self.phases) / GIB

    @property
    def fits(self) -> bool | None:
        return None if self.budget_gib is None else self.peak_gib <= self.budget_gib

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it, in GiB."""
        return {
            "phases": [_in_gib(phase) for phase in self.phases],
            "peak_gib": self.peak_gib,
            "budget_gib": self.budget_gib,
            "fits": self.fits,
            "chosen": [asdict(each) for each in self.chosen],
        }


def usable_gib(budget: str) -> float:
    """Of a budget, such as `24GB` or `auto`, what tensors may take."""
    whole = device_gib() if budget == "auto" else float(budget.removesuffix("GB"))
    return (whole - CONTEXT_GIB) * (1 - SPLIT_SHARE)


def _in_gib(phase: Phase) -> dict[str, Any]:
    sizes = {name: value for name, value in asdict(phase).items() if name != "name"}
    return {"phase": phase.name} | {
        f"{name}_gib": None if value is None else value / GIB for name, value in sizes.items()
    }


class Forecaster:
    """What variants of one run's config hold; what they have in common is simulated once."""

    def __init__(self, family: Family, config: RunConfig) -> None:
        self._family = family
        self._bucket = max(resolved_buckets(config), key=family.num_tokens)
        self._condition = max(resolved_conditions(config), key=lambda entry: entry[1])[0]
        self._steps: dict[str, Step] = {}
        self._encodings: dict[str, list[Phase]] = {}

    def phases(self, config: RunConfig) -> list[Phase]:
        """Each phase of the run, for the largest of its sizes."""
        return [*self._encoding(config), *self._training(config)]

    def _encoding(self, config: RunConfig) -> list[Phase]:
        memory = config.memory
        key = str((memory.vae_tiling, memory.text_encoder_weights, memory.stream_text_encoder))
        if key not in self._encodings:
            self._encodings[key] = encoding_phases(self._work(config), memory=memory)
        return self._encodings[key]

    def _training(self, config: RunConfig) -> list[Phase]:
        memory, optimizer = config.memory, config.optimizer
        checkpointing = config.training.gradient_checkpointing
        computed = (checkpointing, memory.offload_activations, memory.base_weights, memory.vae_tiling)
        key = str((config.method, *computed, optimizer.in_backward))
        if key not in self._steps:
            self._steps[key] = simulate_step(
                self._work(config), checkpointing=checkpointing, memory=memory, release=optimizer.in_backward
            )
        return training_phases(self._steps[key], memory=memory, optimizer=optimizer, shards=num_shards(config))

    def _work(self, config: RunConfig) -> Work:
        family = type(self._family)(self._family.folder, self._family.options, vae_tiling=config.memory.vae_tiling)
        options = config.validation
        sampled = Bucket.parse(options.bucket) if options.bucket else resolved_buckets(config)[0]
        return Work(
            method=build_method(family, config),
            bucket=self._bucket,
            condition=Condition() if self._bucket.num_frames == 1 else self._condition,
            batch_size=config.training.batch_size,
            sampled=sampled if options.every and (options.prompts or options.num_videos) else None,
            validates=bool(options.every),
        )


def num_shards(config: RunConfig) -> int:
    """Among how many processes weights, gradients and optimizer state are shared out."""
    shared = config.parallel.strategy in ("fsdp", "deepspeed")
    return int(os.environ.get("WORLD_SIZE", "1")) if shared else 1
