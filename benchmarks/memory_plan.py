"""What each size of card needs for each published model: the table of `plan --table`, for all of them.

No weights are needed. Run: python benchmarks/memory_plan.py [MODEL ...]
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.published import PUBLISHED  # noqa: E402
from finetrainers.commands.fit import given_options  # noqa: E402
from finetrainers.commands.fit_table import CARDS, Row, build_table, said  # noqa: E402
from finetrainers.commands.opening import check_options  # noqa: E402
from finetrainers.config.load import build_config  # noqa: E402
from finetrainers.engines.single import SingleEngine  # noqa: E402

SIZES = {
    "LTX-Video 2B": ["49x512x768", "121x704x1216"],
    "CogVideoX-5b": ["49x480x720"],
    "CogVideoX1.5-5B": ["81x768x1360"],
    "HunyuanVideo 13B": ["49x512x768", "129x720x1280"],
    "Wan 2.1 1.3B": ["81x480x832"],
    "Wan 2.1 14B": ["49x480x832", "81x480x832"],
}
RESULT = ROOT / "benchmarks" / "results" / "memory_plan.json"


def rows_of(name: str) -> list[Row]:
    """A model's rows: LoRA of rank 128 and full fine-tuning, batches of one, sample videos at the clips' size."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "model": {"path": str(PUBLISHED[name].write(Path(folder) / "model"))},
            "data": {"train": folder, "buckets": SIZES[name]},
            "method": {"name": "lora", "rank": 128},
            "output": folder,
        }
        config = build_config(settings)
        check = functools.partial(check_options, engine=SingleEngine())
        return build_table(config, given=given_options(config), check=check)


def table(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Lines of markdown."""
    yield "| model, size, method | " + " | ".join(CARDS) + " |"
    yield "| --- |" + " --- |" * len(CARDS)
    for name, rows in results.items():
        for row in rows:
            cells = " | ".join(row["cards"][card] for card in CARDS)
            yield f"| {name} {row['bucket']} {row['method']} | {cells} |"


def main() -> None:
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in sys.argv[1:] or PUBLISHED:
        results[name] = [
            {"bucket": row.bucket, "method": row.method, "cards": {card: said(row.cards[card]) for card in CARDS}}
            for row in rows_of(name)
        ]
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
