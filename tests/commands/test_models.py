"""The table of what is supported names everything by which a model is recognised; the laws of noise are shown truly."""

import re
from itertools import pairwise

import pytest

from finetrainers.families.find import all_families
from tests.test_objectives import shifted_law


@pytest.mark.parametrize("columns", [None, 40, 80, 200])
def test_the_table_names_every_family_and_pipeline(call, monkeypatch, columns):
    """In a pipe too, where nothing tells how wide the page is, and on a narrow page: names are not broken."""
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    answer = call("models")
    assert answer.code == 0
    assert re.search(r"\bltx\b", answer.out)
    for family in all_families():
        for word in (family.name, *family.tasks, *family.pipelines, "lora", "full"):
            assert re.search(rf"\b{re.escape(word)}\b", answer.out), word
    assert {"LTXPipeline", "LTXConditionPipeline"} <= set(re.findall(r"\w+", answer.out))


def laws_shown(out: str) -> dict[str, tuple[list[float], list[float]]]:
    """Shares by tenths of the noise levels, and the quartiles, by title."""
    found = {}
    for block in out.strip().split("\n\n"):
        title, *lines, quartiles = block.splitlines()
        shares = [float(re.search(r"([\d.]+)%", line)[1]) / 100 for line in lines]
        found[title] = (shares, [float(number) for number in re.findall(r"\d\.\d+", quartiles)])
    return found


def test_the_noise_levels_of_a_family_are_those_of_its_law(call):
    """LTX-Video's law at each of its lengths, against its cumulated shares worked out elsewhere."""
    answer = call("models", "--timesteps", "ltx")
    assert answer.code == 0
    shown = laws_shown(answer.out)
    assert len(shown) > 1, "one for each length"
    medians = []
    for title, (shares, quartiles) in shown.items():
        num_tokens = int(re.search(r"([\d,]+) tokens", title)[1].replace(",", ""))
        law = shifted_law(min(0.95 + (num_tokens - 1024) * 1.1 / 3072, 2.05), 1.0, 0.1)
        for bar, share in enumerate(shares):
            assert share == pytest.approx(law((bar + 1) / 10 - (bar == 9) * 1e-9) - law(bar / 10), abs=2e-3)
        for quartile, share in zip(quartiles, (0.25, 0.5, 0.75), strict=True):
            assert law(quartile) == pytest.approx(share, abs=2e-3)
        medians.append(quartiles[1])
    assert all(less < more for less, more in pairwise(medians)), "more tokens, more noise"


def test_every_family_shows_its_laws(call, model):
    for name in (*(family.name for family in all_families()), str(model)):
        answer = call("models", "--timesteps", name)
        assert answer.code == 0, answer.err
        for shares, quartiles in laws_shown(answer.out).values():
            assert len(shares) == 10 and sum(shares) == pytest.approx(1, abs=0.006), "rounded to tenths of a percent"
            assert len(quartiles) == 3 and quartiles == sorted(quartiles)


def test_a_family_that_is_none(call):
    refusal = call("models", "--timesteps", "nowhere").refusal
    assert "nowhere" in refusal and all(family.name in refusal for family in all_families())
