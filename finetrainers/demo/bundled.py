"""The small model that lies in the package: LTX-Video's architecture, trained on rendered shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "ltx-shapes"
"""A diffusers folder, weights in fp16. It renders 17 frames of 64x64 pixels; `benchmarks/base_model/` made it."""
NUM_FRAMES, HEIGHT, WIDTH, FPS = 17, 64, 64, 8.0
"""What the bundled model renders best."""


def copy_bundled_model(folder: Path) -> Path:
    """Put the bundled model where a user finds it, and give `folder` back."""
    return shutil.copytree(BUNDLED_MODEL, folder, dirs_exist_ok=True)
