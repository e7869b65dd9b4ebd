"""What tests of every room may ask for."""

import os

# Before torch is imported: several test processes share few cores, and OpenMP's threads spin while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """A folder of filmed clips with a metadata.csv: `../shared/videos`, or where $FINETRAINERS_CLIPS says."""
    folder = Path(os.environ.get("FINETRAINERS_CLIPS", Path(__file__).parents[2] / "shared" / "videos"))
    if not (folder / "metadata.csv").is_file():
        pytest.skip(f"no real clips in {folder}; name their folder in FINETRAINERS_CLIPS")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by the names of their rows, each written when it is first asked for."""
    from tests.families.tiny import TINY

    class Written(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = TINY[name].write(tmp_path_factory.mktemp("models") / name)
            return self[name]

    return Written()


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A command run in-process sets up logging for its process; the next test finds it as the last one did."""
    root, ours, theirs = logging.getLogger(), logging.getLogger("finetrainers"), logging.getLogger("bitsandbytes")
    levels = [(logger, logger.level) for logger in (root, ours, theirs)]
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    for logger, level in levels:
        logger.setLevel(level)
