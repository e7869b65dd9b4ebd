"""Steps with compiled blocks over steps without, taken in turn in one process: the bundled model's, LoRA of rank 32,
clips of 17x64x64 in batches of 8, fp32; with no gradient checkpointing and with all of it.
Run: python benchmarks/compiled.py
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from finetrainers.commands.completing import build_method, complete  # noqa: E402
from finetrainers.config.load import build_config  # noqa: E402
from finetrainers.demo.bundled import copy_bundled_model  # noqa: E402
from finetrainers.engines.single import SingleEngine  # noqa: E402
from finetrainers.optimizers.build import build_optimizer  # noqa: E402
from finetrainers.training.models import load_models  # noqa: E402
from finetrainers.training.simulated import blank_batch  # noqa: E402
from finetrainers.types import Bucket, Condition  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compiled.json"
SIZE, BATCH_SIZE, RANK = Bucket(17, 64, 64), 8, 32
WARM_UP, ROUNDS = 3, 15


def build_step(folder: Path, *, checkpointing: str, compiles: bool) -> Callable[[], Any]:
    """A forward and a backward pass and an update, over and over on one batch."""
    settings = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder), "buckets": [str(SIZE)]},
        "method": {"name": "lora", "rank": RANK},
        "training": {"precision": "fp32"},
        "output": str(folder),
    }
    family, config = complete(build_config(settings))
    method = build_method(family, config)
    models, trained = load_models(
        method,
        SingleEngine(),
        options=config.memory,
        seed=0,
        checkpointing=checkpointing,
        kept_in=folder,
        compiles=compiles,
    )
    for model in models.values():
        model.train()
    optimizer = build_optimizer(trained, config.optimizer, seed=0)
    batch = blank_batch(method, SIZE, Condition(), batch_size=BATCH_SIZE)

    def step() -> None:
        method.loss(models, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def compare(folder: Path, checkpointing: str) -> dict[str, float]:
    """Medians of both, the first step of the compiled one, and the median of their ratios."""
    plain = build_step(folder, checkpointing=checkpointing, compiles=False)
    compiled = build_step(folder, checkpointing=checkpointing, compiles=True)
    first = seconds_of(compiled)
    for _ in range(WARM_UP):
        plain(), compiled()
    rounds = [(seconds_of(plain), seconds_of(compiled)) for _ in range(ROUNDS)]
    return {
        "eager_seconds": round(statistics.median(eager for eager, _ in rounds), 4),
        "compiled_seconds": round(statistics.median(fast for _, fast in rounds), 4),
        "compiled_over_eager": round(statistics.median(fast / eager for eager, fast in rounds), 3),
        "first_compiled_step_seconds": round(first, 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_bundled_model(folder / "model")
        record = {"machine": describe_machine() | {"threads": torch.get_num_threads()}}
        record |= {checkpointing: compare(folder, checkpointing) for checkpointing in ("none", "full")}
    text = json.dumps(record, indent=2) + "\n"
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
