"""`finetrainers demo`: the whole of it, offline, on a tiny model and rendered clips, in minutes on a CPU."""

from __future__ import annotations

from pathlib import Path

import yaml

from finetrainers.commands.sample import sample
from finetrainers.commands.train import train
from finetrainers.config.load import build_config
from finetrainers.demo.clips import render_clips
from finetrainers.demo.model import write_tiny_ltx
from finetrainers.errors import UserError
from finetrainers.families.find import hide_loading_bars
from finetrainers.folder import RunFolder, write_atomically

_NUM_CLIPS = 12
_SIZE = "17x96x96"
_FPS = 16.0


def demo(output: str, *, steps: int) -> int:
    """Render clips, write a model, train a LoRA, validate, and sample with and without it."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, but is {steps}")
    root = Path(output)
    hide_loading_bars()
    print(f"rendering {_NUM_CLIPS} captioned clips and writing a tiny LTX-Video model under {root}/")
    clips = render_clips(root / "clips", _NUM_CLIPS, num_frames=33, height=128, width=128, fps=_FPS).parent
    model = write_tiny_ltx(root / "model")
    run = RunFolder(root / "run")
    settings = demo_settings(root, run, steps)
    write_atomically(root / "demo.yaml", yaml.safe_dump(settings, sort_keys=False))
    train(build_config(settings))
    prompt = "a red circle moves to the right over a dark blue background"
    for folder, lora in (("without-lora", None), ("with-lora", str(run.weights / "latest"))):
        target = str(root / "videos" / folder)
        sample(
            model=str(model),
            prompt=[prompt],
            lora=lora,
            output=target,
            size=_SIZE,
            fps=_FPS,
            steps=10,
            precision="fp32",
        )
    print(
        f"clips:    {clips}\nconfig:   {root / 'demo.yaml'}\nmetrics:  {run.metrics}\nreport:   {run.report}\n"
        f"The model's weights are random, so its videos are noise: this shows that the whole job runs here, not what a "
        "trained model looks like. For your own clips and a trained model, see docs/quickstart.md."
    )
    return 0


def demo_settings(root: Path, run: RunFolder, steps: int) -> dict[str, object]:
    """The demo's config, as a user would write it."""
    return {
        "model": {"path": str(root / "model")},
        "data": {"train": str(root / "clips"), "buckets": [_SIZE], "validation": 0.2},
        "method": {"name": "lora", "rank": 8},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": steps, "batch_size": 2, "precision": "fp32"},
        "validation": {"every": max(steps // 2, 1), "num_inference_steps": 10},
        "checkpoint": {"every": max(steps // 2, 1)},
        "output": str(run.root),
    }
