"""What a training step of the published models at their published sizes keeps for its backward pass, on the device and
on the host, for each way of keeping less. Counted on simulated tensors (`finetrainers.memory.simulation`), exact for
what operations keep, without a GPU; nothing is measured.
Run: python benchmarks/saved_activations.py [MODEL ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.predicted import SIZES  # noqa: E402
from benchmarks.published import PUBLISHED, open_published  # noqa: E402
from finetrainers.commands.completing import build_method  # noqa: E402
from finetrainers.memory.simulation import HOST, LiveBytes, peak_bytes  # noqa: E402
from finetrainers.training.measures import save_activations  # noqa: E402
from finetrainers.training.simulated import blank_batch, simulated_models  # noqa: E402
from finetrainers.types import Bucket, Condition  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "saved_activations.json"
METHODS = {"lora": {"name": "lora", "rank": 128}, "full": {"name": "full"}}
WORDS = ("none", "every-2", "attention", "feed_forward", "full")
WAYS = [f"{word}{place}" for word in WORDS for place in ("", " + offload")]
GIB = 2**30


def count(name: str, method_name: str, way: str) -> dict[str, float]:
    """One entry: GiB and units of bytes kept after the forward pass; a unit is a block's hidden states of the video in
    bf16."""
    word, _, offloaded = way.partition(" + ")
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        sections = {"method": METHODS[method_name], "memory": {"offload_activations": bool(offloaded)}}
        family, config = open_published(PUBLISHED[name], size, Path(folder), **sections)
        with simulated_models(build_method(family, config)) as (method, models):
            offload = config.memory.offload_activations
            save_activations(method, models, checkpointing=word, offload=offload, host=HOST)
            batch = blank_batch(method, Bucket.parse(size), Condition())
            host = LiveBytes(HOST)
            with host.counted():
                peak = peak_bytes(lambda: method.loss(models, batch))
            shape: Any = models["transformer"].config
            width = shape.num_attention_heads * shape.attention_head_dim
            blocks = len(method.family.blocks("transformer", models["transformer"]))
    unit = batch.num_tokens * width * 2 * blocks
    return {
        "units_per_block": round(peak.after_forward / unit, 3),
        "kept_gib": round(peak.after_forward / GIB, 4),
        "peak_gib": round(peak.peak / GIB, 4),
        "gradients_gib": round(peak.after_backward / GIB, 4),
        "host_gib": round(host.peak / GIB, 4),
    }


def table(entries: dict[str, dict[str, float]]) -> Iterator[str]:
    """Lines of markdown: units a block, and GiB kept on the device, of it at the peak, and on the host."""
    yield "| model, size, method | " + " | ".join(WAYS) + " |"
    yield "| --- |" + " ---: |" * len(WAYS)
    for name, size in SIZES.items():
        for method in METHODS:
            row = [entries.get(f"{name}, {method}, {way}") for way in WAYS]
            cells = ["" if entry is None else _cell(entry) for entry in row]
            if any(cells):
                yield f"| {name}, {size}, {method} | {' | '.join(cells)} |"


def _cell(entry: dict[str, float]) -> str:
    host = f" + {entry['host_gib']:.3g}" if entry["host_gib"] else ""
    return f"{entry['units_per_block']:.3g}: {entry['kept_gib']:.3g}{host} GiB"


def main(names: list[str]) -> None:
    """Count all, or these models anew, and write them down."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"entries": {}}
    results["versions"] = {package: version(package) for package in ("torch", "diffusers", "peft")}
    for name in names or SIZES:
        for method in METHODS:
            for way in WAYS:
                results["entries"][f"{name}, {method}, {way}"] = count(name, method, way)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for line in table(results["entries"]):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
