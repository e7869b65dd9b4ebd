"""Kernels that a training step of the published models launches at their published sizes, the bytes that they move and
what the step keeps for its backward pass, eager and with compiled blocks. Counted on simulated tensors
(`benchmarks.kernel_counter`), without a GPU and without noise; nothing is measured.
Run: python benchmarks/kernel_counts.py [MODEL ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kernel_counter import KernelCounter  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.published import PUBLISHED, Published, open_published  # noqa: E402
from finetrainers.commands.completing import build_method  # noqa: E402
from finetrainers.memory.simulation import HOST, saved_bytes  # noqa: E402
from finetrainers.training.compiling import compile_blocks  # noqa: E402
from finetrainers.training.measures import save_activations  # noqa: E402
from finetrainers.training.simulated import blank_batch, simulated_models  # noqa: E402
from finetrainers.types import Bucket, Condition  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"
SIZES = {
    "LTX-Video 2B": "49x512x768",
    "CogVideoX-2b": "49x480x720",
    "CogVideoX-5b": "49x480x720",
    "HunyuanVideo 13B": "49x512x768",
    "Wan 2.1 1.3B": "49x480x832",
}
MODELS = {**PUBLISHED, "CogVideoX-2b": Published("cogvideox-2b")}
RANK = 128
WAYS = [f"{mode}, {checkpointing}" for mode in ("eager", "compiled") for checkpointing in ("none", "full")]
"""How blocks run, and `training.gradient_checkpointing`."""


def count(name: str, way: str) -> dict[str, float]:
    """One entry: what the forward and the backward pass of one clip launch, in bf16 with LoRA, and, with no
    checkpointing, what is saved between them in units: a block's hidden states of the video in bf16. The optimizer's
    kernels are left out."""
    mode, checkpointing = way.split(", ")
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        family, config = open_published(MODELS[name], size, Path(folder), method={"name": "lora", "rank": RANK})
        counter = KernelCounter()
        with simulated_models(build_method(family, config)) as (method, models):
            save_activations(method, models, checkpointing=checkpointing, offload=False, host=HOST)
            batch = blank_batch(method, Bucket.parse(size), Condition())
            blocks = method.family.blocks("transformer", models["transformer"])
            if mode == "compiled":
                torch.compiler.reset()
                compile_blocks(blocks, backend=counter.backend)
            with counter.counted():
                method.loss(models, batch).mean().backward()
            launches = counter.launches
            entry = {"kernels": launches.kernels, **asdict(launches), "programs": len(counter.programs)}
            if checkpointing == "none":
                shape: Any = models["transformer"].config
                unit = batch.num_tokens * shape.num_attention_heads * shape.attention_head_dim * 2
                kept = saved_bytes(lambda: method.loss(models, batch), models.values())
                entry["units_per_block"] = round(kept / unit / len(blocks), 3)
    return entry


def table(entries: dict[str, dict[str, float]]) -> Iterator[str]:
    """Lines of markdown: kernels, of them matrix products and attention; GB moved by the others; units a block."""
    yield "| model, size | " + " | ".join(WAYS) + " |"
    yield "| --- |" + " --- |" * len(WAYS)
    for name, size in SIZES.items():
        row = [entries.get(f"{name}, {way}") for way in WAYS]
        if any(row):
            yield f"| {name}, {size} | {' | '.join('' if entry is None else _cell(entry) for entry in row)} |"


def _cell(entry: dict[str, float]) -> str:
    units = f"; {entry['units_per_block']:.3g} units" if "units_per_block" in entry else ""
    parts = f"{entry['matmuls']:,} + {entry['attention']:,} + {entry['others']:,}"
    return f"{entry['kernels']:,} ({parts}); {entry['moved_bytes'] / 1e9:,.0f} GB{units}"


def main(names: list[str]) -> None:
    """Count all, or these models anew, and write them down."""
    results: dict[str, Any] = {"machine": describe_machine(), "entries": {}}
    if RESULTS.is_file():
        results["entries"] = json.loads(RESULTS.read_text())["entries"]
    for name in names or SIZES:
        for way in WAYS:
            results["entries"][f"{name}, {way}"] = count(name, way)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for line in table(results["entries"]):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
