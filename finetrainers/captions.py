"""Captions meet the model's tokenizer: what is unknown to it, and what is cut off at the model's length."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetrainers.families.base import Family

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenReport:
    """How well a tokenizer copes with captions."""

    num_captions: int
    num_tokens: int
    num_unknown: int
    unknown_characters: float
    """Share of the captions' characters that the unknown tokens stand for."""
    num_lost: int
    """Tokens beyond the model's length."""
    num_cut: int
    """Captions that are cut off."""
    limit: int
    first_cut: str
    first_unknown: str

    @property
    def unknown_share(self) -> float:
        return self.num_unknown / max(self.num_tokens, 1)

    @property
    def lost_share(self) -> float:
        return self.num_lost / max(self.num_tokens, 1)


def count_captions(family: Family, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> TokenReport:
    """Count over captions, each as often as it is given."""
    counts = family.count_tokens(tokenizers, captions)
    num_characters = sum(len(caption) for caption in captions)
    hidden = sum(len(caption) * count.unknown_share for caption, count in zip(captions, counts, strict=True))
    cut = [caption for caption, count in zip(captions, counts, strict=True) if count.num_tokens > count.limit]
    strange = [caption for caption, count in zip(captions, counts, strict=True) if count.num_unknown]
    return TokenReport(
        num_captions=len(captions),
        num_tokens=sum(count.num_tokens for count in counts),
        num_unknown=sum(count.num_unknown for count in counts),
        unknown_characters=hidden / max(num_characters, 1),
        num_lost=sum(max(count.num_tokens - count.limit, 0) for count in counts),
        num_cut=len(cut),
        limit=min((count.limit for count in counts), default=0),
        first_cut=cut[0] if cut else "",
        first_unknown=strange[0] if strange else "",
    )


def report_captions(family: Family, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> None:
    """Say how many captions are cut off at the model's length, and what share of tokens its tokenizer does not know."""
    report = count_captions(family, tokenizers, captions)
    if report.num_cut:
        logger.warning(
            "%d of %d captions are longer than the %d tokens that the model reads; their ends are cut off, the "
            "first being: %.80s",
            *(report.num_cut, len(captions), report.limit, report.first_cut),
        )
    if report.num_unknown:
        logger.warning(
            "%.1f %% of the captions' tokens, which stand for %.1f %% of their characters, are unknown to the model's "
            "tokenizer, which cannot tell them apart; the first caption with one: %.80s",
            *(100 * report.unknown_share, 100 * report.unknown_characters, report.first_unknown),
        )
