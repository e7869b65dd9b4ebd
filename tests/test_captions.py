"""What a tokenizer makes of captions in any script: what it does not know, and what is cut off."""

import logging
import string
from itertools import groupby
from typing import Any

import pytest

from finetrainers.captions import TokenReport, count_captions, report_captions
from finetrainers.config.schema import ModelConfig
from finetrainers.families.base import Family
from finetrainers.families.find import find_family
from tests.families.tiny import TINY

KNOWN = set(string.ascii_letters + string.digits + string.punctuation)
LIMIT = 128


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return find_family(ModelConfig(path=str(TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model")))))


def counted(family: Family, captions: list[str]) -> TokenReport:
    return count_captions(family, family.load_tokenizers(), captions)


def expected(caption: str) -> tuple[int, int]:
    """Tokens and unknown ones: a beginning for each word, then a token for each known character and one for each run of
    others, and the end of the text. So T5 reads, whose words are ASCII characters here."""
    runs = [
        [(known, len(list(run))) for known, run in groupby(word, key=KNOWN.__contains__)] for word in caption.split()
    ]
    unknown = sum(not known for word in runs for known, _ in word)
    return 1 + len(runs) + unknown + sum(length for word in runs for known, length in word if known), unknown


CAPTIONS = {
    "English": "a red circle moves, slowly",
    "Chinese": "红色的圆慢慢移动",
    "Chinese among English": "a 红色 circle, 慢慢",
    "Arabic": "دائرة حمراء تتحرك ببطء",
    "Hebrew with digits": "3 עיגולים אדומים",
    "emoji": "a 🔴 moves 🐢🐢",
    "one accent": "café",
    "nothing": "",
    "as long as the model reads": "x" * (LIMIT - 2),
    "a token longer": "x" * (LIMIT - 1),
    "much longer": "a long story of dots " * 40,
    "long and unknown": "红 " * 100,
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_counts_of_one_caption(family, case):
    caption = CAPTIONS[case]
    num_tokens, num_unknown = expected(caption)
    report = counted(family, [caption])
    assert (report.num_captions, report.limit) == (1, LIMIT)
    assert (report.num_tokens, report.num_unknown) == (num_tokens, num_unknown)
    assert report.unknown_share == pytest.approx(num_unknown / num_tokens)
    strange = sum(not character.isspace() and character not in KNOWN for character in caption)
    assert report.unknown_characters == pytest.approx(strange / max(len(caption), 1))
    lost = max(num_tokens - LIMIT, 0)
    assert (report.num_lost, report.num_cut) == (lost, int(lost > 0))
    assert report.lost_share == pytest.approx(lost / num_tokens)
    assert report.first_cut == (caption if lost else "")
    assert report.first_unknown == (caption if num_unknown else "")


def test_counts_add_up_over_captions(family):
    """Each as often as it is given; the first of each kind is named."""
    captions = [*CAPTIONS.values(), CAPTIONS["Chinese"]]
    report, counts = counted(family, captions), [expected(caption) for caption in captions]
    assert report.num_captions == len(captions)
    assert report.num_tokens == sum(tokens for tokens, _ in counts)
    assert report.num_unknown == sum(unknown for _, unknown in counts)
    assert report.num_lost == sum(max(tokens - LIMIT, 0) for tokens, _ in counts)
    assert report.num_cut == 3
    assert (report.first_unknown, report.first_cut) == (CAPTIONS["Chinese"], CAPTIONS["a token longer"])
    assert report.unknown_share == pytest.approx(report.num_unknown / report.num_tokens)


SAID: dict[str, tuple[list[str], list[list[str]]]] = {
    "nothing wrong": (["English", "nothing", "as long as the model reads"], []),
    "cut": (["English", "a token longer"], [["1 of 2 captions", "than the 128 tokens", "x" * 80]]),
    "unknown": (["Arabic"], [["% of the captions' tokens, which stand for", "are unknown", CAPTIONS["Arabic"]]]),
    "both": (
        ["much longer", "Chinese"],
        [["1 of 2 captions", "a long story"], ["unknown", CAPTIONS["Chinese"]]],
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_said(family, caplog: Any, case):
    names, said = SAID[case]
    captions = [CAPTIONS[name] for name in names]
    with caplog.at_level(logging.WARNING, "finetrainers"):
        report_captions(family, family.load_tokenizers(), captions)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("finetrainers")]
    assert len(messages) == len(said)
    for message, parts in zip(messages, said, strict=True):
        assert all(part in message for part in parts), message
    if "unknown" in str(said):
        share = 100 * counted(family, captions).unknown_share
        assert messages[-1].startswith(f"{share:.1f} %")
