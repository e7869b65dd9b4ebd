"""The option reference says what the schema says."""

from pathlib import Path

from finetrainers.config.document import options_markdown
from finetrainers.config.schema import METHODS, RunConfig

OPTIONS = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_committed_reference_is_the_printed_one():
    assert OPTIONS.read_text(encoding="utf-8") == options_markdown(), (
        "run `python -m finetrainers.config.document > docs/options.md`"
    )


def test_every_option_is_listed_and_explained():
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    options = {"output"} | {f"method.{name}" for kind in METHODS.values() for name in kind.model_fields}
    for name, kind in sections.items():
        options |= {f"{name}.{key}" for key in getattr(kind, "model_fields", {})}
    rows = [line.split(" | ") for line in options_markdown().splitlines() if line.startswith("| `")]
    assert {row[0].split("`")[1] for row in rows} == options
    assert all(len(row) == 4 and len(row[3]) > 10 for row in rows)


def test_types_and_defaults_are_spelt_as_yaml_spells_them():
    reference = options_markdown()
    assert "| `checkpoint.keep` † | whole number ≥ 1 or `null` | `3` |" in reference
    assert "| `data.strict` † | true or false | `false` |" in reference
    assert "| `model.path` | text | **must be given** |" in reference
    assert "| `data.conditions` | mapping of text to number ≥ 0, ≤ 1 or `null` | `null` |" in reference
    keys = "`method` (`interpolate`, `ntk`, `riflex`) and `frames` (whole number ≥ 1, ≤ 100000)"
    assert f"| `model.rope_temporal` | mapping with {keys} or `null` | `null` |" in reference
    assert "| `training.precision` | `bf16`, `fp32` | `bf16` |" in reference
