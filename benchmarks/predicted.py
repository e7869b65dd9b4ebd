"""The table of docs/cluster.md: step time of the published models on 8, 64 and 512 GPUs, by the model of
`finetrainers.scaling`. Their sizes and work are counted on the meta device; nothing is measured.
Run: python benchmarks/predicted.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.published import PUBLISHED, open_published  # noqa: E402
from finetrainers.commands.completing import build_method  # noqa: E402
from finetrainers.commands.plan import step_work  # noqa: E402
from finetrainers.planning import BucketPlan, count_flop  # noqa: E402
from finetrainers.scaling import Cluster, Work, predict  # noqa: E402
from finetrainers.types import Bucket, Condition  # noqa: E402

SIZES = {
    "LTX-Video 2B": "49x512x768",
    "CogVideoX-5b": "49x480x720",
    "HunyuanVideo 13B": "49x512x768",
    "Wan 2.1 14B": "49x480x832",
}
ENGINES = ("ddp", "fsdp", "fsdp hybrid")
NODES = (1, 8, 64)


def count_work(name: str, method_name: str) -> Work:
    """What a step of one clip asks of each GPU, with every other option left out."""
    with tempfile.TemporaryDirectory() as folder:
        size = SIZES[name]
        family, config = open_published(PUBLISHED[name], size, Path(folder), method={"name": method_name})
        method = build_method(family, config)
        with torch.device("meta"):
            models = method.build()
            method.attach(models, seed=0)
        cast(Any, models["transformer"]).enable_gradient_checkpointing()
        bucket = Bucket.parse(size)
        flop = count_flop(family, models, bucket, Condition())
        counted = BucketPlan(size, 1, family.num_tokens(bucket), flop[0] / 1e12, flop[1] / 1e12)
        work = step_work(method, models, counted, config.training)
    assert work is not None, "these families can be counted"
    return work


def table() -> Iterator[str]:
    """Lines of markdown; each cell has all of `ENGINES`."""
    columns = [f"s on {8 * nodes} GPUs" for nodes in NODES]
    yield " | ".join(["| model, size", "method", "TFLOP", *columns, "efficiency on 512", "held GiB on 8 |"])
    yield "| --- | --- |" + " ---: |" * (len(columns) + 3)
    for name in SIZES:
        for method in ("lora", "full"):
            work = count_work(name, method)
            made = [[predict(engine, work, Cluster(nodes)) for engine in ENGINES] for nodes in NODES]
            cells = [" / ".join(f"{each.step_seconds:#.3g}" for each in row) for row in made]
            cells.append(" / ".join(f"{each.efficiency:.1%}" for each in made[-1]))
            cells.append(" / ".join(f"{each.state_bytes / 2**30:.3g}" for each in made[0]))
            yield f"| {name}, {SIZES[name]} | {method} | {work.training_tflop:,.0f} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
