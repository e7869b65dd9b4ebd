"""What a step of the published models keeps for its backward pass, against the record of
benchmarks/saved_activations.py: it must not grow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "saved_activations.py"
RESULTS = BENCHMARK.parent / "results" / "saved_activations.json"
ENTRIES = json.loads(RESULTS.read_text())["entries"]
QUICK = {
    "LTX-Video 2B, lora, none",
    "LTX-Video 2B, lora, attention + offload",
}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("saved_activations", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "entry", [pytest.param(entry, marks=[] if entry in QUICK else [pytest.mark.slow]) for entry in ENTRIES]
)
def test_nothing_grows(entry, benchmark):
    """More than one part in a hundred is a change that must be looked at, and written down by running the script."""
    counted = benchmark.count(*entry.split(", "))
    for name, value in ENTRIES[entry].items():
        assert counted[name] <= 1.01 * value + 0.001, name


def test_all_is_written_down(benchmark):
    assert ENTRIES.keys() == {
        f"{name}, {method}, {way}" for name in benchmark.SIZES for method in benchmark.METHODS for way in benchmark.WAYS
    }


def test_each_way_keeps_less():
    """Than none of them: whole blocks the least, and on the device nearly nothing once it lies on the host."""
    for entry, counted in ENTRIES.items():
        model, method, way = entry.split(", ")
        plain = ENTRIES[f"{model}, {method}, {way.partition(' + ')[0]}"]
        assert counted["kept_gib"] <= ENTRIES[f"{model}, {method}, none"]["kept_gib"]
        if " + " in way:
            assert counted["kept_gib"] < 0.6 * plain["kept_gib"] and counted["peak_gib"] <= 1.02 * plain["peak_gib"]
            # What is not kept on the device is on the host.
            assert counted["host_gib"] == pytest.approx(plain["kept_gib"] - counted["kept_gib"], rel=0.05)
