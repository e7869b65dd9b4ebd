"""`finetrainers demo`: a style learned by the bundled model, offline, in minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finetrainers.commands.train import train
from finetrainers.config.load import build_config
from finetrainers.demo.bundled import FPS, HEIGHT, NUM_FRAMES, WIDTH, copy_bundled_model
from finetrainers.demo.clips import FLAT_UNSAID, NEON, Scene, neon, render_clips, render_scene
from finetrainers.demo.comparison import read_video, write_comparison
from finetrainers.demo.measures import share_of_way
from finetrainers.errors import UserError
from finetrainers.families.find import hide_loading_bars
from finetrainers.folder import RunFolder, read_rows, steps_in, write_atomically

_NUM_CLIPS, _NUM_HELD_OUT = 24, 8
_SIZE = f"{NUM_FRAMES}x{HEIGHT}x{WIDTH}"
_SCENES = (
    Scene("circle", "red", "moves to the right"),
    Scene("star", "yellow", "moves upwards"),
    Scene("square", "cyan", "grows"),
    Scene("triangle", "pink", "circles clockwise"),
)


def demo(output: str, *, steps: int) -> int:
    """Render clips in a style, teach it to the bundled model as a LoRA, and show the same prompts before and after."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, but is {steps}")
    root = Path(output)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made a folder ({error.strerror}); give another one") from None
    hide_loading_bars()
    print(f"rendering {_NUM_CLIPS} clips in a neon style, and as many plain ones, under {root / 'clips'}/")
    write_clips(root / "clips")
    copy_bundled_model(root / "model")
    run = RunFolder(root / "run")
    settings = demo_settings(root, run, steps)
    write_atomically(root / "demo.yaml", yaml.safe_dump(settings, sort_keys=False, width=120))
    train(build_config(settings))
    shown = Shown.read(run)
    movie, picture = write_comparison(root, shown.columns(), styled_prompts(), fps=FPS)
    before, after = held_out_losses(run)
    print(f"held-out loss: {before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.1f} %)")
    for name, (styled, plain) in shown.progress().items():
        print(f"style, {name}: {styled:.0%} of the way with the trigger, {plain:.0%} without it")
    print(
        f"clips:   {root / 'clips'}\nconfig:  {root / 'demo.yaml'}\nvideos:  {run.samples}\n"
        f"side by side: {movie}, {picture}\nreport:  {run.report}\n"
        f"Now try: finetrainers sample {root / 'model'} --lora {run.weights / 'latest'} --size {_SIZE} --fps {FPS:g} "
        f'--prompt "{NEON.trigger} a green cross moves to the left"'
    )
    return 0


def write_clips(folder: Path) -> None:
    """What is learned from, what must not change, and what is held out. Rendered larger than it is trained, because
    colours in an mp4 have half the resolution."""
    size: dict[str, Any] = {"num_frames": NUM_FRAMES, "height": 2 * HEIGHT, "width": 2 * WIDTH, "fps": FPS}
    render_clips(folder / "neon", _NUM_CLIPS, seed=1, look=NEON, **size)
    # Without clips that look as before, the style would come without its trigger too.
    render_clips(folder / "plain", _NUM_CLIPS, seed=2, look=FLAT_UNSAID, **size)
    render_clips(folder / "held-out", _NUM_HELD_OUT, seed=3, look=NEON, **size)


def demo_settings(root: Path, run: RunFolder, steps: int) -> dict[str, Any]:
    """The demo's config, as a user would write it."""
    return {
        "model": {"path": str(root / "model")},
        "data": {
            "train": [str(root / "clips" / "neon"), str(root / "clips" / "plain")],
            "validation": str(root / "clips" / "held-out"),
            "buckets": [_SIZE],
        },
        "method": {"name": "lora", "rank": 32},
        "optimizer": {"lr": 4e-3, "lr_scheduler": "linear", "lr_warmup_steps": 20},
        "training": {"steps": steps, "batch_size": 8, "precision": "fp32", "gradient_checkpointing": "none"},
        "validation": {
            "every": steps,
            "prompts": [*styled_prompts(), *plain_prompts()],
            "num_inference_steps": 30,
        },
        "checkpoint": {"every": steps},
        "output": str(run.root),
    }


def styled_prompts() -> list[str]:
    return [f"{NEON.trigger} {scene.caption}" for scene in _SCENES]


def plain_prompts() -> list[str]:
    return [scene.caption for scene in _SCENES]


@dataclass(frozen=True)
class Shown:
    """The videos of a demo, uint8 FHWC, one a scene."""

    base: list[np.ndarray]
    base_plain: list[np.ndarray]
    learned: list[np.ndarray]
    learned_plain: list[np.ndarray]
    """Plain are those whose prompt has no trigger."""
    target: list[np.ndarray]

    @classmethod
    def read(cls, run: RunFolder) -> Shown:
        """Those from before the first step and from after the last one, and the style as the renderer draws it."""
        steps = steps_in(run.samples)
        base, learned = (sorted(steps[step].glob("*.mp4")) for step in (min(steps), max(steps)))
        middle = len(_SCENES)
        parts = (base[:middle], base[middle:], learned[:middle], learned[middle:])
        target = [
            render_scene(scene, num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH, style=neon) for scene in _SCENES
        ]
        base_videos, base_plain, learned_videos, learned_plain = ([read_video(path) for path in part] for part in parts)
        return cls(base_videos, base_plain, learned_videos, learned_plain, target)

    def columns(self) -> dict[str, list[np.ndarray]]:
        """As they stand side by side."""
        names = ("base model", "with the LoRA", "what it learned from", "LoRA, no trigger")
        return dict(zip(names, (self.base, self.learned, self.target, self.learned_plain), strict=True))

    def progress(self) -> dict[str, tuple[float, float]]:
        """For each statistic of the style, the share of the way from the base model to the target, with the trigger and
        without it."""
        styled = share_of_way(self.base, self.learned, self.target)
        plain = share_of_way(self.base_plain, self.learned_plain, self.target)
        return {name: (styled[name], plain[name]) for name in styled}


def held_out_losses(run: RunFolder) -> tuple[float, float]:
    """Before the first step, and after the last one."""
    losses = [row["validation_loss"] for row in read_rows(run.metrics) if "validation_loss" in row]
    return losses[0], losses[-1]
