"""`finetrainers models`: the table of families, variants and tasks, and what each supports."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from finetrainers.config.schema import METHODS
from finetrainers.families.find import all_families


def models() -> int:
    """Print the table."""
    table = Table("family", "models", "tasks", "methods", "recognised by (model_index.json)")
    for family in all_families():
        table.add_row(
            family.name, family.variants, ", ".join(family.tasks), ", ".join(METHODS), ", ".join(family.pipelines)
        )
    Console(width=None).print(table)
    return 0
