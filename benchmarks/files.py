"""B11 to B14: reading a cached sample, the size of a checkpoint, the start of the program, the memory of a tiny run.

Run: python benchmarks/files.py
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import LTXVideoTransformer3DModel
from loop import FakeFamily
from machine import describe_machine, write_record
from safetensors.torch import save_file
from tiny_ltx import write_tiny_ltx

from finetrainers.config.schema import LoraOptions, ModelConfig, ObjectiveConfig, OptimizerConfig
from finetrainers.data.cache import Cache
from finetrainers.demo.clips import render_clips
from finetrainers.engines.single import SingleEngine
from finetrainers.families.ltx import TARGETS
from finetrainers.methods.lora import Lora
from finetrainers.objectives import build_objective
from finetrainers.optimizers.build import build_optimizer
from finetrainers.training.checkpoint import Checkpointer
from finetrainers.training.saving import gather_weights
from finetrainers.training.schedule import build_schedule
from finetrainers.training.state import TrainState

GOALS = {
    "B11 ms per 2.4 MB item": 0.25,
    "B12 checkpoint / LoRA file": 3.1,
    "B12 training waits / a copy in memory": 1.1,
    "B13 --help seconds": 0.3,
    "B13 first step / imports": 1.2,
    "B14 peak MB of a tiny run": 480,
}
PEERS = {
    "B11": "torch.load(weights_only) of two files 1.30 ms",
    "B12": "finetrainers main 148 times the LoRA file (the whole base model)",
    "B13": "4.9 s (ai-toolkit) to 11.1 s (SimpleTuner)",
    "B14": "600 (v0.0.1) to 640 MB (main); imports alone 420 MB",
}


def cache_read() -> dict[str, float]:
    """Milliseconds to read latents and text of one sample, 2.4 MB in bf16, in random order."""
    with tempfile.TemporaryDirectory() as folder:
        cache, count = Cache(Path(folder)), 200
        for index in range(count):
            latents = torch.randn(2, 128, 7, 16, 24).bfloat16()
            cache.write("videos", f"{index:04d}", {"mean": latents[0], "logvar": latents[1]})
            cache.write("texts", f"{index:04d}", {"prompt_embeds": torch.randn(128, 4096).bfloat16()})
        first, again = [], []
        for epoch in range(5):
            order, cache = list(range(count)), Cache(Path(folder))
            random.Random(epoch).shuffle(order)
            for times in (first, again):
                for index in order:
                    begun = time.perf_counter()
                    cache.read("videos", f"{index:04d}"), cache.read("texts", f"{index:04d}")
                    times.append(1000 * (time.perf_counter() - begun))
    return {
        "median_ms": statistics.median(first),
        "p95_ms": statistics.quantiles(first, n=20)[-1],
        "later_epochs_median_ms": statistics.median(again),
    }


class Bare:
    """As much of a trainer as a checkpoint looks at."""

    gradient_accumulation_steps = 1

    def __init__(self, trained: dict[str, torch.nn.Parameter]) -> None:
        self.trained, self.callbacks, self.device = trained, (), torch.device("cpu")
        self.state, self.engine = TrainState(step=1), SingleEngine()
        options = OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        self.optimizer = build_optimizer(trained, options, seed=0)
        self.schedule = build_schedule("constant", self.optimizer, warmup_steps=0, steps=1)
        for parameter in trained.values():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()


def checkpoint() -> dict[str, float]:
    """Size of a checkpoint over that of its LoRA file, and seconds to save and load against a copy in memory."""
    transformer = LTXVideoTransformer3DModel(num_layers=4)
    law = ObjectiveConfig(timestep_sampling="uniform", shift=1.0)
    objective = build_objective(law, alphas_cumprod=None, noise_range=(0.0, 1.0))
    family = FakeFamily(Path(), ModelConfig(path="."))
    models = {"transformer": transformer}
    method = Lora(family, objective, LoraOptions(rank=128, target_modules=TARGETS), dtype=torch.float32)
    method.attach(models, seed=0)
    trainer: Any = Bare(method.trained(models))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method.save(models, gather_weights(trainer.engine, method, models), folder)
        lora = next(folder.glob("*.safetensors")).stat().st_size
        saver = Checkpointer(folder / "checkpoints", every=0, keep=1, identity={})
        begun = time.perf_counter()
        saver.save(trainer)
        copied_seconds = time.perf_counter() - begun
        saver.on_end(trainer)
        save_seconds = time.perf_counter() - begun
        size = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
        begun = time.perf_counter()
        saver.resume(trainer, "auto")
        load_seconds = time.perf_counter() - begun
        state = [tensor for entry in trainer.optimizer.state.values() for tensor in entry.values()]
        begun = time.perf_counter()
        copies = [tensor.detach().clone() for tensor in [*trainer.trained.values(), *state]]
        copy_seconds = time.perf_counter() - begun
        del copies
        begun = time.perf_counter()
        save_file({str(n): t.detach().clone() for n, t in enumerate([*trainer.trained.values(), *state])}, folder / "x")
        bare_seconds = time.perf_counter() - begun
    return {
        "lora_mb": lora / 1e6,
        "checkpoint_mb": size / 1e6,
        "ratio": size / lora,
        "training_waits_seconds": copied_seconds,
        "copy_in_memory_seconds": copy_seconds,
        "save_seconds": save_seconds,
        "load_and_verify_seconds": load_seconds,
        "one_bare_safetensors_write_seconds": bare_seconds,
    }


def start_up() -> dict[str, float]:
    """Wall seconds in fresh interpreters, warm: of `--help`; of the imports that training needs; and until a tiny run
    whose dataset is encoded has taken its first step. The last two take turns."""

    def seconds(*arguments: str, until: Callable[[], bool] | None = None) -> float:
        begun = time.perf_counter()
        with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while until is not None and process.poll() is None and not until():
                time.sleep(0.005)
            taken = time.perf_counter() - begun
            process.communicate()
        assert process.returncode == 0
        return taken if until is not None else time.perf_counter() - begun

    helped = [seconds("-m", "finetrainers", "train", "--help") for _ in range(8)][1:]
    imports, first_step = [], []
    with tempfile.TemporaryDirectory() as name:
        config, run = write_config(Path(name)), Path(name) / "run"
        for _ in range(6):
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            (run / "metrics.jsonl").unlink(missing_ok=True)
            imports.append(seconds("-c", IMPORTS))
            stepped = partial(_has_text, run / "metrics.jsonl")
            first_step.append(seconds("-m", "finetrainers", "train", str(config), "training.steps=1", until=stepped))
    # At first it encodes the clips.
    ratios = [step / alone for step, alone in zip(first_step[1:], imports[1:], strict=True)]
    return {
        "median_seconds": statistics.median(helped),
        "min_seconds": min(helped),
        "imports_seconds": statistics.median(imports[1:]),
        "first_step_seconds": statistics.median(first_step[1:]),
        "first_step_over_imports": statistics.median(ratios),
    }


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
IMPORTS = "import torch, diffusers, peft, transformers; from diffusers import LTXPipeline; " + PEAK
RUN = "import sys; from finetrainers.cli import main; assert main(sys.argv[1:]) == 0; " + PEAK


def write_config(folder: Path) -> Path:
    """A tiny run on four clips, in this folder."""
    settings = {
        "model": {"path": str(write_tiny_ltx(folder / "model"))},
        "data": {"train": str(render_clips(folder / "clips", 4, num_frames=17).parent), "buckets": ["17x96x96"]},
        "method": {"rank": 4},
        "training": {"steps": 20, "precision": "fp32"},
        "validation": {"every": 0},
        "output": str(folder / "run"),
    }
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


def tiny_run() -> dict[str, float]:
    """Peak resident memory of a whole tiny run, and of the imports alone, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        config = write_config(Path(name))

        def peak_mb(code: str, *arguments: str) -> float:
            done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
            return int(done.stdout.splitlines()[-1]) / 1024

        return {"imports_mb": peak_mb(IMPORTS), "run_mb": peak_mb(RUN, "train", str(config), "--quiet")}


def main() -> None:
    """Measure all; write and print the record."""
    # In this order: a process that is started counts the memory of the one that started it.
    results = {"B14": tiny_run(), "B13": start_up(), "B11": cache_read(), "B12": checkpoint()}
    record = {"machine": describe_machine(), "goals": GOALS, "results": results, "peers": PEERS}
    write_record(Path(__file__).with_name("results") / "files.json", record)


if __name__ == "__main__":
    main()
