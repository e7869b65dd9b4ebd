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
            family.name, family.variants, ", ".join(family.tasks), ", ".join(METHODS), "\n".join(family.pipelines)
        )
    # At least so wide that no name is broken, also in a pipe and on a narrow page.
    Console(width=max(Console().width, 120)).print(table)
    return 0
