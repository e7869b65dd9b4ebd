"""What must be done for a model to be trained on each size of card: the table of `plan --table`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from finetrainers.commands.completing import complete
from finetrainers.commands.fit import Chosen, Fitted, cheapest, set_option, usable_gib
from finetrainers.commands.forecasting import Forecaster
from finetrainers.config.load import resolved_buckets
from finetrainers.config.schema import FullOptions, LoraOptions, RunConfig
from finetrainers.errors import UserError
from finetrainers.families.base import Family

CARDS = ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB")
_WORDS = {
    "memory.offload_activations": "activations on the host",
    "memory.stream_text_encoder": "text encoder streamed",
    "optimizer.offload": "optimizer on the host",
    "memory.vae_tiling": "tiles",
}


@dataclass(frozen=True)
class Row:
    """One size and one method."""

    bucket: str
    method: str
    cards: dict[str, list[Chosen] | None]
    """By card what must be chosen; None where nothing fits."""

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return asdict(self)


def build_table(config: RunConfig, *, given: Collection[str], check: Callable[[Family, RunConfig], None]) -> list[Row]:
    """A row for each of the config's sizes by LoRA and by full fine-tuning, from a config as the user wrote it, of
    which the options `given` stay."""
    rows = []
    lora = config.method if isinstance(config.method, LoraOptions) else LoraOptions()
    for options in (lora, FullOptions(name="full")):
        family, whole = complete(config.model_copy(update={"method": options}), weights=False)
        if not family.runs_on_meta:
            raise UserError(f"--table: what {family.name} holds cannot be told without its weights")
        for bucket in resolved_buckets(whole):
            variant = set_option(whole, "data.buckets", [str(bucket)])
            rows.append(_row(family, variant, given, check))
    return rows


def _row(family: Family, config: RunConfig, given: Collection[str], check: Callable[[Family, RunConfig], None]) -> Row:
    forecaster, cards = Forecaster(family, config), {}
    for card in CARDS:
        found = cheapest(
            forecaster, config, usable_gib(card), given=given, check=lambda variant: check(family, variant)
        )
        cards[card] = found.chosen if isinstance(found, Fitted) else None
    assert config.data.buckets is not None
    return Row(config.data.buckets[0], config.method.name, cards)


def table_lines(rows: list[Row]) -> Iterator[str]:
    """The table as people read it."""
    yield "what is needed to train on a card, of what the config leaves open:"
    for row in rows:
        yield f"  {row.bucket}, {row.method}:"
        for card, chosen in row.cards.items():
            yield f"    {card:>5}: {said(chosen)}"


def said(chosen: list[Chosen] | None) -> str:
    """Measures in a few words."""
    if chosen is None:
        return "does not fit"
    return ", ".join(_word(each) for each in chosen) or "nothing"


def _word(chosen: Chosen) -> str:
    if chosen.option == "training.gradient_checkpointing":
        return f"checkpointing {chosen.value}"
    if chosen.option == "memory.stream_blocks":
        return f"{chosen.value} blocks streamed"
    return _WORDS.get(chosen.option, str(chosen.value))
