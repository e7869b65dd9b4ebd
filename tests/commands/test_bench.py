"""What `bench` measures on a tiny model: its numbers against each other and the plan's, and what it leaves behind."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetrainers.commands import bench as module
from finetrainers.data.batch import BatchDrawer
from tests.end_to_end.runs import write_config

TOKENS = 2 * 2 * 3
"""Of 9 frames of 64x96: a token is 8 frames of 32x32 pixels, and the first frame makes one of its own."""
KEYS = {
    "device", "processes", "family", "method", "precision", "compiled", "cuda_graphs", "gradient_checkpointing",
    "sizes", "steps",
    "first_step_seconds", "warm_up_steps", "warm_up_seconds", "seconds", "step_seconds_median", "step_seconds_p95",
    "data_seconds_median", "data_seconds_p95", "data_share", "samples", "tokens", "samples_per_second",
    "tokens_per_second", "peak_allocated_gib", "peak_reserved_gib", "predicted_gib", "flop", "executed_flop",
    "matmul_side", "matmul_flop_per_second", "mfu", "hfu", "kernels", "kernel_seconds", "busy_share", "verdict",
}  # fmt: skip
ON_A_GPU = {"peak_reserved_gib", "kernels", "kernel_seconds", "busy_share"}


@pytest.fixture
def config(model: Path, clips: Path, tmp_path: Path) -> Path:
    """Of a run of one step, with all that a bench has no use for."""
    return write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips), "buckets": ["9x64x96"]},
        method={"name": "lora", "rank": 4},
        training={"steps": 1, "precision": "fp32"},
        validation={"every": 1, "prompts": ["a red circle"], "num_inference_steps": 2},
        checkpoint={"every": 1},
        output=str(tmp_path / "run"),
    )


@pytest.fixture
def small_matrices(monkeypatch):
    monkeypatch.setattr(module, "SIDES", {"cpu": 64})


def bench(call: Callable[..., Any], config: Path, *arguments: str) -> dict[str, Any]:
    answer = call("bench", config, "--json", *arguments)
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def planned_flop(call: Callable[..., Any], config: Path, checkpointing: str) -> float:
    """Of one sample, forward and backward."""
    plan = json.loads(call("plan", config, "--json", f"training.gradient_checkpointing={checkpointing}").out)
    return plan["buckets"][0]["training_tflop"] * 1e12


def test_numbers_agree_with_each_other_and_with_the_plan(call, config):
    got = bench(call, config, "--steps", "6", "training.batch_size=2")
    assert got.keys() == KEYS
    assert {name for name in KEYS if got[name] is None} == ON_A_GPU
    assert (got["family"], got["method"], got["precision"], got["processes"]) == ("ltx", "lora", "fp32", 1)
    assert (got["compiled"], got["gradient_checkpointing"], got["steps"]) == (False, "full", 6)
    # Batches of 2, 2, 2 and 1: the fourth step meets a new size.
    assert got["warm_up_steps"] == 4
    size = {"bucket": "9x64x96", "condition": "none"}
    assert got["sizes"] == [size | {"samples": 2, "batches": 5}, size | {"samples": 1, "batches": 1}]
    assert (got["samples"], got["tokens"]) == (11, 11 * TOKENS)
    assert 0 < got["step_seconds_median"] <= got["step_seconds_p95"]
    assert 0 <= got["data_seconds_median"] <= got["data_seconds_p95"]
    assert 0 < got["first_step_seconds"] < got["warm_up_seconds"]
    assert got["samples_per_second"] == pytest.approx(11 / got["seconds"])
    assert got["tokens_per_second"] == pytest.approx(11 * TOKENS / got["seconds"])
    assert 0 < got["predicted_gib"] < got["peak_allocated_gib"]
    assert got["flop"] == pytest.approx(planned_flop(call, config, "none") * 11 / 6)
    assert got["executed_flop"] == pytest.approx(planned_flop(call, config, "full") * 11 / 6)
    assert got["executed_flop"] > got["flop"]
    second = 6 / got["seconds"] / got["matmul_flop_per_second"]
    assert (got["mfu"], got["hfu"]) == pytest.approx((got["flop"] * second, got["executed_flop"] * second))
    assert 1e8 < got["matmul_flop_per_second"] < 1e14 and got["matmul_side"] == 1024


@pytest.mark.usefixtures("small_matrices")
def test_nothing_is_computed_again_without_checkpointing(call, config):
    got = bench(call, config, "--steps", "2", "training.gradient_checkpointing=none", "training.precision=bf16")
    assert got["flop"] == got["executed_flop"] == pytest.approx(planned_flop(call, config, "none"))
    assert got["precision"] == "bf16"


@pytest.mark.usefixtures("small_matrices")
def test_conditions_and_accumulated_batches_are_counted(call, config):
    options = ["model.task=image-to-video", "data.conditions={first: 0.5}", "validation.prompts=[]"]
    got = bench(call, config, "--steps", "4", *options, "training.gradient_accumulation_steps=3")
    counts = {size["condition"]: size["batches"] for size in got["sizes"]}
    assert counts.keys() == {"first", "none"} and sum(counts.values()) == got["samples"] == 12
    assert got["tokens"] == 12 * TOKENS


def tree(folder: Path) -> dict[str, bytes | None]:
    """What lies there, but for the encoded dataset."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes() if path.is_file() else None
        for name, path in paths.items()
        if name != "cache" and not name.startswith("cache/")
    }


@pytest.mark.usefixtures("small_matrices")
@pytest.mark.parametrize("apart", [False, True])
def test_only_the_encoded_dataset_is_left_for_train(call, config, tmp_path, apart):
    cache = [f"data.cache={tmp_path / 'shared'}"] if apart else []
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "memory.jsonl"):
        (run / name).write_text("an earlier run's")
    before = tree(run)
    bench(call, config, "--steps", "2", *cache)
    assert tree(run) == before
    assert (run / "cache").exists() is not apart
    trained = call("train", config, "--resume", "never", *cache)
    assert trained.code == 0, trained.err
    assert "videos: 7 of 7 are encoded already" in trained.err
    # Seven captions, the empty one and the prompt.
    assert "texts: 9 of 9 are encoded already" in trained.err


@pytest.mark.usefixtures("small_matrices")
def test_a_slow_source_is_named(call, config, monkeypatch):
    draw = BatchDrawer.draw

    def draw_slowly(*given: Any) -> Any:
        time.sleep(0.5)
        print("what a library prints is no part of the answer")
        return draw(*given)

    monkeypatch.setattr(BatchDrawer, "draw", draw_slowly)
    got = bench(call, config, "--steps", "2", "data.num_workers=0")
    assert got["data_seconds_median"] >= 0.5
    assert 0.1 < got["data_share"] < 1
    first, second = got["verdict"]
    assert first.startswith(f"waits for data: {100 * got['data_share']:.0f} % of a step; set data.num_workers=2")
    assert second.startswith("the rest is bound by ")


@pytest.mark.usefixtures("small_matrices")
def test_the_text_says_the_same(call, config):
    answer = call("bench", config, "--steps", "2", "training.gradient_checkpointing=none")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("ltx, lora, fp32, on CPU")
    assert lines[1] == "  9x64x96, given none, batches of 1: 2"
    names = [line[2:20].strip() for line in lines[2:11]]
    assert names == [
        "first step", "warm-up", "step", "waiting for data", "speed", "memory", "matrix products", "operations",
        "of that rate",
    ]  # fmt: skip
    assert lines[11].startswith(("bound by ", "waits for data"))


WRONG = [
    (["--steps", "1"], ["--steps: must be 2 or more, but is 1"]),
    (["--steps", "many"], ["--steps: must be 2 or more, but is many"]),
    (["training.stepz=1"], ["training.stepz", "steps"]),
    (["data.buckets=[10x64x96]"], ["data.buckets 10x64x96", "9x64x96"]),
    (["data.train=nowhere"], ["nowhere"]),
]


@pytest.mark.parametrize(("arguments", "parts"), WRONG)
def test_wrong_input(call, config, arguments, parts):
    refusal = call("bench", config, *arguments).refusal
    assert all(part in refusal for part in parts), refusal
    assert "absent.yaml" in call("bench", config.with_name("absent.yaml")).refusal


def test_several_processes_are_measured_as_one_run(config):
    command = [sys.executable, "-m", "finetrainers", "bench", str(config), "--json", "--steps", "2", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert (got["processes"], got["steps"], got["samples"], got["tokens"]) == (2, 2, 4, 4 * TOKENS)
    assert sum(size["batches"] for size in got["sizes"]) == 2


def test_the_median_step_is_profiled_once_more(monkeypatch):
    """What a GPU would be asked, without one."""
    taken: list[Any] = []
    profile = {"kernels": 3996, "kernel_seconds": 0.08, "busy_seconds": 0.06}
    monkeypatch.setattr(module, "profiled", lambda step: profile | {"loss": step()})
    batches = SimpleNamespace(world_size=2, start=lambda position: iter([position]))
    trainer: Any = SimpleNamespace(
        device=torch.device("cuda"),
        engine=SimpleNamespace(gather=lambda value: [value, 7]),
        batches=batches,
        gradient_accumulation_steps=3,
        step=lambda stream: taken.append(next(stream)),
    )
    seconds = [9.0, 0.3, 0.01, 0.2, 0.1, 5.0, 0.4]
    times: Any = SimpleNamespace(seconds=lambda: seconds)
    kernels = module.profile_step(trainer, times, {number: [] for number in (1, 3, 4, 6)})
    # Step 3, from the start of its rounds of 3 batches for 2 processes.
    assert taken == [3 * 3 * 2]
    assert (kernels.kernels, kernels.kernel_seconds) == (3996, 0.08)
    assert kernels.busy_share == pytest.approx(0.06 / 0.2)
    assert kernels.lines() == ["  kernels           3,996 a step, 0.08 s of them; the GPU is busy 30% of a step"]
