"""The table of what is supported names everything by which a model is recognised."""

import re

from finetrainers.families.find import all_families


def test_the_table_names_every_family_and_pipeline(call):
    """In a pipe too, where nothing tells how wide the page is: names are not broken."""
    answer = call("models")
    assert answer.code == 0
    assert re.search(r"\bltx\b", answer.out)
    for family in all_families():
        for word in (family.name, *family.tasks, *family.pipelines, "lora", "full"):
            assert re.search(rf"\b{re.escape(word)}\b", answer.out), word
    assert {"LTXPipeline", "LTXConditionPipeline"} <= set(re.findall(r"\w+", answer.out))


def test_a_narrow_page_breaks_no_name(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert "LTXImageToVideoPipeline" in call("models").out
