"""`finetrainers models`: the table of families, variants and tasks, and how each draws its noise levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from finetrainers.config.schema import METHODS, ModelConfig, ObjectiveConfig
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.families.find import all_families, find_family
from finetrainers.objectives import Law, build_law
from finetrainers.types import Bucket

_NUM_DRAWS, _NUM_BARS, _BAR_WIDTH = 20_000, 10, 40


def models(*, timesteps: str | None = None) -> int:
    """Print the table, or the noise levels of one family or model."""
    if timesteps is None:
        _print_table()
    else:
        for title, law, num_tokens in _laws(timesteps):
            print(f"{title}\n{_histogram(law, num_tokens)}\n")
    return 0


def _print_table() -> None:
    names = ("tasks", "methods", "recognised by (model_index.json)")
    table = Table(Column("family", no_wrap=True), "models", *(Column(name, no_wrap=True) for name in names))
    for kind in all_families():
        table.add_row(kind.name, kind.variants, "\n".join(kind.tasks), ", ".join(METHODS), "\n".join(kind.pipelines))
    # At least so wide that no name is broken, also in a pipe and on a narrow page.
    Console(width=max(Console().width, 120)).print(table)


def _laws(name: str) -> Iterator[tuple[str, Law, int]]:
    """A title, a law and a number of tokens for each distribution that belongs to a family's name, or to a model."""
    kinds = {kind.name: kind for kind in all_families()}
    if name in kinds:
        for variant, options in kinds[name].laws.items():
            yield from _by_tokens(f"{name}, {variant}", options, kinds[name].lengths)
    elif Path(name).expanduser().is_dir() or "/" in name:
        yield from _of_model(find_family(ModelConfig(path=name), weights=False))
    else:
        raise UserError(f"--timesteps {name}: no such family or model; the families are {', '.join(kinds)}")


def _of_model(family: Family) -> Iterator[tuple[str, Law, int]]:
    defaults = family.defaults("lora")
    options = {key.removeprefix("objective."): value for key, value in defaults.items() if key.startswith("objective.")}
    length = family.num_tokens(Bucket.parse(defaults["data.buckets"][0]))
    yield from _by_tokens(f"{family.folder.name} ({family.name})", options, (length,))


def _by_tokens(title: str, options: dict[str, Any], lengths: tuple[int, ...]) -> Iterator[tuple[str, Law, int]]:
    """One law, or one for each length where the law looks at it."""
    law, said = build_law(ObjectiveConfig(**options)), ", ".join(f"{key} {value}" for key, value in options.items())
    for length in lengths if options["timestep_sampling"] == "shifted_logit_normal" else lengths[:1]:
        tokens = f", {length:,} tokens" if options["timestep_sampling"] == "shifted_logit_normal" else ""
        yield f"{title}: {said}{tokens}", law, length


def _histogram(law: Law, num_tokens: int) -> str:
    """Shares of draws by noise level, 0 clean and 1 noise alone, as bars of text; and the law's quartiles."""
    levels = sorted(law(num_tokens, (draw + 0.5) / _NUM_DRAWS) for draw in range(_NUM_DRAWS))
    counts = Counter(min(int(level * _NUM_BARS), _NUM_BARS - 1) for level in levels)
    most = max(counts.values())
    lines = []
    for bar in range(_NUM_BARS):
        share = counts[bar] / _NUM_DRAWS
        low, high = bar / _NUM_BARS, (bar + 1) / _NUM_BARS
        lines.append(f"  {low:.1f}-{high:.1f}  {share:6.1%}  {'#' * round(_BAR_WIDTH * counts[bar] / most)}")
    # Not the law at 1/4, 1/2 and 3/4, which gives them only where it is no mixture.
    quartiles = ", ".join(f"{levels[_NUM_DRAWS * quarter // 4]:.3f}" for quarter in (1, 2, 3))
    return "\n".join([*lines, f"  quartiles {quartiles}"])
