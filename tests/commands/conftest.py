"""A tiny model, a few rendered clips, and commands run in this process."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetrainers.cli import main
from finetrainers.demo.clips import render_clips
from tests.families.tiny import TINY


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line by which wrong input is refused."""
        lines = [line for line in self.err.splitlines() if line.startswith("finetrainers: ")]
        assert self.code == 2 and len(lines) == 1 and "Traceback" not in self.err, self
        assert self.out == ""
        return lines[0]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """Run `finetrainers ARGUMENTS` here."""
    root, ours = logging.getLogger(), logging.getLogger("finetrainers")
    before = root.handlers[:], root.level, ours.level

    def call(*arguments: Any) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    yield call
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("models") / "ltx")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, so that batches of two and of three leave one over."""
    return render_clips(tmp_path_factory.mktemp("clips"), 7, num_frames=18, height=64, width=96, fps=16.0).parent
