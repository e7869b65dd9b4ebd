"""What the tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetrainers.demo.clips import render_clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven, so that the last batches of an epoch are smaller, and processes have unequal ones."""
    folder = tmp_path_factory.mktemp("clips")
    return render_clips(folder, 7, num_frames=22, height=64, width=96, fps=16.0).parent
