"""How long it takes to order a large dataset into batches, and whether the order is whole (B15).

    python benchmarks/order.py

prints what it measures as JSON and writes it to benchmarks/results/order.json: a million samples of 64 sizes in batches
of 4 over 8 processes.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from machine import describe_machine

from finetrainers.data.batch import BatchOrder
from finetrainers.types import Bucket

OUT = Path(__file__).parent / "results" / "order.json"
NUM_SAMPLES, NUM_BUCKETS, BATCH_SIZE, NUM_PROCESSES, ROUNDS = 1_000_000, 64, 4, 8, 5


def main() -> None:
    sizes = [Bucket(8 * (number % 8) + 1, 64 * (number // 8 + 1), 96) for number in range(NUM_BUCKETS)]
    draw = random.Random(0)
    samples: list[Any] = [SimpleNamespace(bucket=draw.choice(sizes)) for _ in range(NUM_SAMPLES)]
    building, shuffling = [], []
    for seed in range(ROUNDS):
        begun = time.perf_counter()
        order = BatchOrder(samples, batch_size=BATCH_SIZE, seed=seed)
        built = time.perf_counter()
        order[0]
        building.append(built - begun)
        shuffling.append(time.perf_counter() - built)
    seen, counts = bytearray(NUM_SAMPLES), [0] * NUM_PROCESSES
    for position in range(order.batches_per_epoch):
        for index in order[position][1]:
            seen[index] += 1
        counts[position % NUM_PROCESSES] += 1
    record = {
        "machine": describe_machine(),
        "samples": NUM_SAMPLES,
        "buckets": NUM_BUCKETS,
        "processes": NUM_PROCESSES,
        "build_seconds": round(statistics.median(building), 3),
        "epoch_seconds": round(statistics.median(shuffling), 3),
        "dropped": seen.count(0),
        "doubled": sum(count > 1 for count in seen),
        "batches_more_than_the_least": max(counts) - min(counts),
        "batches": order.batches_per_epoch,
    }
    text = json.dumps(record, indent=2) + "\n"
    OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
