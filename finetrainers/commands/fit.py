"""From `memory.budget` to the options that fit it: of the measures that save memory the first, in the order of what
they cost, and no more of them than needed."""

from __future__ import annotations

import functools
import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetrainers.commands.forecasting import GIB, Forecaster
from finetrainers.config.load import resolved_buckets
from finetrainers.config.schema import RunConfig
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.memory.report import device_gib
from finetrainers.training.forecast import Phase
from finetrainers.types import Bucket

logger = logging.getLogger(__name__)

CONTEXT_GIB = 0.6
"""What CUDA and its libraries hold besides what is asked of them."""
SPLIT_SHARE = 0.04
"""Of the rest, what is lost between tensors, because the allocator hands out whole blocks."""


@dataclass(frozen=True)
class Measure:
    """An option whose value saves memory."""

    option: str
    value: Any
    cost: str
    """What one pays for it."""


MEASURES = (
    Measure("training.gradient_checkpointing", "every-2", "a sixth more work"),
    Measure("training.gradient_checkpointing", "full", "a third more work"),
    Measure("memory.offload_activations", True, "copies in every pass, mostly hidden behind the work"),
    Measure("memory.stream_text_encoder", True, "captions are encoded more slowly, once"),
    Measure("optimizer.offload", True, "copies of the optimizer's state in every step"),
    Measure("memory.stream_blocks", "all", "copies of the weights in every pass, hidden where a block takes longer"),
    Measure("memory.vae_tiling", True, "latents that differ a little at the seams of tiles"),
    Measure("optimizer.name", "adamw_8bit", "updates that differ a little"),
    Measure("method.weights_dtype", "bf16", "updates that differ a little"),
    Measure("memory.base_weights", "int8", "a base model that differs a little, made whole in every pass"),
    Measure("memory.base_weights", "nf4", "a base model that differs more, made whole in every pass"),
)
"""In the order in which they are taken: first what changes no number, then what does."""


@dataclass(frozen=True)
class Chosen:
    """A measure that was taken, and the run's peak without and with it."""

    option: str
    value: Any
    cost: str
    before_gib: float
    after_gib: float


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, and whether that fits."""

    phases: list[Phase]
    """Empty where the family cannot be counted."""
    budget_gib: float | None
    """What tensors may take of the budget; None where there is none."""
    chosen: list[Chosen]

    @property
    def peak_gib(self) -> float | None:
        return max((phase.peak / GIB for phase in self.phases), default=None)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {
            "phases": [_in_gib(phase) for phase in self.phases],
            "peak_gib": self.peak_gib,
            "budget_gib": self.budget_gib,
            "fits": None if self.budget_gib is None or self.peak_gib is None else self.peak_gib <= self.budget_gib,
            "chosen": [asdict(each) for each in self.chosen],
        }

    def lines(self) -> list[str]:
        """The plan as people read it."""
        if not self.phases:
            return ["memory: cannot be told without the weights"]
        names = ("weights", "gradients", "optimizer", "activations", "peak", "host")
        lines = [f"memory, GiB{'':<5}" + "".join(f"{name:>13}" for name in names)]
        for phase in self.phases:
            sizes = [getattr(phase, name) for name in names]
            cells = ("not counted" if size is None else f"{size / GIB:.2f}" for size in sizes)
            lines.append(f"  {phase.name:<14}" + "".join(f"{cell:>13}" for cell in cells))
        if self.budget_gib is not None:
            lines.append(f"memory.budget leaves {self.budget_gib:.1f} GiB; taken for it, of what was left open:")
            lines += [
                f"  {each.option}={each.value}: {each.before_gib:.1f} -> {each.after_gib:.1f} GiB ({each.cost})"
                for each in self.chosen
            ] or ["  nothing, as all fits"]
        return lines


def usable_gib(budget: str) -> float:
    """Of a budget, such as `24GB` or `auto`, what tensors may take."""
    whole = device_gib() if budget == "auto" else float(budget.removesuffix("GB"))
    return (whole - CONTEXT_GIB) * (1 - SPLIT_SHARE)


def given_options(config: RunConfig) -> frozenset[str]:
    """The options that the user set, as `section.key`; a config that a run wrote down sets them all."""
    return frozenset(
        f"{section}.{name}" for section, value in config for name in getattr(value, "model_fields_set", ())
    )


def fit(
    family: Family, config: RunConfig, *, given: Collection[str], check: Callable[[RunConfig], None]
) -> tuple[RunConfig, MemoryPlan]:
    """The config with measures that make it fit `memory.budget`, where it has one, of those that are not `given` and
    that `check` does not refuse; and what it then holds.

    Raises UserError, saying what would fit, where nothing does.
    """
    if not family.runs_on_meta:
        if config.memory.budget is not None:
            raise UserError(f"memory.budget: what {family.name} holds cannot be told without its weights: leave it out")
        return config, MemoryPlan([], None, [])
    forecaster = Forecaster(family, config)
    if config.memory.budget is None:
        return config, MemoryPlan(forecaster.phases(config), None, [])
    limit = usable_gib(config.memory.budget)
    found = cheapest(forecaster, config, limit, given=given, check=check)
    if isinstance(found, NothingFits):
        raise UserError(_refusal(family, found.least, limit))
    return found.config, MemoryPlan(forecaster.phases(found.config), limit, found.chosen)


@dataclass(frozen=True)
class Fitted:
    """A config that fits, and the measures that made it."""

    config: RunConfig
    chosen: list[Chosen]


@dataclass(frozen=True)
class NothingFits:
    """The config with every measure that was left open."""

    least: RunConfig


def cheapest(
    forecaster: Forecaster,
    config: RunConfig,
    limit: float,
    *,
    given: Collection[str],
    check: Callable[[RunConfig], None],
) -> Fitted | NothingFits:
    """The first measures that make a config fit so many GiB, and of these only what is needed."""

    def fits(variant: RunConfig) -> bool:
        return _is_taken(variant, check) and forecaster.peak_gib(variant) <= limit

    if "training.gradient_checkpointing" not in given:
        config = set_option(config, "training.gradient_checkpointing", "none")
    if fits(config):
        return Fitted(config, [])
    measures = _left_to_choose(config, given, check)
    variants = [functools.reduce(_take, measures[:count], config) for count in range(len(measures) + 1)]
    count = bisect_left(variants, True, key=fits)
    if count == len(variants):
        return NothingFits(variants[-1])
    needed = _needed(config, measures[:count], fits)
    fitted = functools.reduce(_take, needed, config)
    if any(measure.option == "memory.stream_blocks" for measure in needed):
        fitted = _stream_less(fitted, forecaster, limit)
    return Fitted(fitted, _explain(config, fitted, needed, forecaster))


def _explain(config: RunConfig, fitted: RunConfig, measures: Sequence[Measure], forecaster: Forecaster) -> list[Chosen]:
    """What each measure did, one after another."""
    chosen = []
    for measure in measures:
        value, before = get_option(fitted, measure.option), forecaster.peak_gib(config)
        config = set_option(config, measure.option, value)
        chosen.append(Chosen(measure.option, value, measure.cost, before, forecaster.peak_gib(config)))
    return chosen


def get_option(config: RunConfig, option: str) -> Any:
    """The value of `section.key`."""
    section, name = option.split(".")
    return getattr(getattr(config, section), name)


def has_option(config: RunConfig, option: str) -> bool:
    """Whether the run's method has such an option."""
    section, name = option.split(".")
    return hasattr(getattr(config, section), name)


def set_option(config: RunConfig, option: str, value: Any) -> RunConfig:
    """The config with another value of `section.key`."""
    section, name = option.split(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def _take(config: RunConfig, measure: Measure) -> RunConfig:
    return set_option(config, measure.option, measure.value)


def _left_to_choose(config: RunConfig, given: Collection[str], check: Callable[[RunConfig], None]) -> list[Measure]:
    """The measures that this run can take, each beside those before it."""
    left = []
    for measure in MEASURES:
        if measure.option in given or not has_option(config, measure.option):
            continue
        variant = _take(config, measure)
        if _is_taken(variant, check):
            config = variant
            left.append(measure)
    return left


def _is_taken(config: RunConfig, check: Callable[[RunConfig], None]) -> bool:
    """Whether the run takes these options together."""
    try:
        check(config)
    except UserError:
        return False
    return True


def _needed(config: RunConfig, measures: Sequence[Measure], fits: Callable[[RunConfig], bool]) -> list[Measure]:
    """Of measures that fit together those without which they would not, the costliest spared first."""
    # Of one option the last value counts.
    needed = list({each.option: each for each in measures}.values())
    for measure in reversed(needed[:-1]):
        without = [each for each in needed if each is not measure]
        if fits(functools.reduce(_take, without, config)):
            needed = without
    return needed


def _stream_less(config: RunConfig, forecaster: Forecaster, limit: float) -> RunConfig:
    """The config with no more blocks streamed than must be."""
    counts = range(1, forecaster.num_blocks(config))
    variants = [set_option(config, "memory.stream_blocks", count) for count in counts]
    fewest = bisect_left(variants, True, key=lambda variant: forecaster.peak_gib(variant) <= limit)
    return variants[fewest] if fewest < len(variants) else config


def _refusal(family: Family, config: RunConfig, limit: float) -> str:
    """That nothing fits, and which size would."""
    bucket = max(resolved_buckets(config), key=family.num_tokens)
    least = Forecaster(family, config).peak_gib(config)
    reason = (
        f"memory.budget {config.memory.budget} leaves {limit:.1f} GiB, and with every measure that is left open this "
        f"run needs {least:.1f} GiB"
    )
    for smaller in _smaller(family, bucket):
        variant = set_option(config, "data.buckets", [str(smaller)])
        if (reached := Forecaster(family, variant).peak_gib(variant)) <= limit:
            return f"{reason}; data.buckets {smaller} instead of {bucket} would need {reached:.1f} GiB"
    return f"{reason}; smaller clips would not do: leave more options open, or take a smaller model"


def _smaller(family: Family, bucket: Bucket) -> Iterator[Bucket]:
    """Sizes that the model takes, of fewer and fewer tokens."""
    for frames, sides in ((1 / 2, 1.0), (1 / 2, 3 / 4), (1 / 4, 1 / 2)):
        smaller = bucket
        for name, share in (("num_frames", frames), ("height", sides), ("width", sides)):
            most = int(share * getattr(bucket, name))
            sizes = (replace(smaller, **{name: value}) for value in range(most, 0, -1))
            smaller = next((size for size in sizes if not family.check_bucket(size)), smaller)
        yield smaller


def _in_gib(phase: Phase) -> dict[str, Any]:
    sizes = {name: value for name, value in asdict(phase).items() if name != "name"}
    return {"phase": phase.name} | {
        f"{name}_gib": None if value is None else value / GIB for name, value in sizes.items()
    }
