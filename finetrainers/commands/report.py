"""`finetrainers report`: rebuild the page of a run from what is on disk."""

from __future__ import annotations

from finetrainers.folder import RunFolder
from finetrainers.reporting.report import write_report


def report(run: str) -> int:
    """Write `report.html` and print where it is."""
    print(write_report(RunFolder(run)))
    return 0
