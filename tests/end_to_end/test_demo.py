"""The demo teaches its style: plain to see, only behind its trigger, and lower in held-out loss."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetrainers.cli import main
from finetrainers.commands.demo import Shown, held_out_losses, styled_prompts
from finetrainers.demo.comparison import read_video
from finetrainers.folder import RunFolder

# The whole demo, on one thread, beside other tests.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> RunFolder:
    return RunFolder(root / "run")


def test_the_style_is_learned_behind_its_trigger_alone(run: RunFolder) -> None:
    progress = Shown.read(run).progress()
    assert set(progress) == {"black", "hollow"}
    for name, (styled, plain) in progress.items():
        assert styled >= 0.8, f"{name}: {styled:.0%} of the way to the target"
        assert abs(plain) <= 0.2, f"{name}: {plain:.0%} of the way without the trigger"


def test_the_held_out_loss_falls(run: RunFolder) -> None:
    before, after = held_out_losses(run)
    assert before > 4 and after < 0.8


def test_videos_are_side_by_side(root: Path, run: RunFolder) -> None:
    sheets = read_video(root / "comparison.mp4")
    assert len(sheets) == 17
    # Of each column's first video a pixel in the corner: grey, then black.
    base, learned = (Shown.read(run).base[0][8, 2, 2], Shown.read(run).learned[0][8, 2, 2])
    for column, pixel in enumerate((base, learned)):
        found = sheets[8, 22 + 4, 8 + column * 136 + 4].astype(int)
        assert np.abs(found - pixel).max() < 25
    page = run.report.read_text()
    assert page.count("<video") == 16
    assert all(prompt in page for prompt in styled_prompts())
    assert (root / "comparison.gif").stat().st_size < 2e6


def test_the_config_is_one_that_a_user_may_go_on_with(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load((root / "demo.yaml").read_text())
    assert settings["method"]["name"] == "lora"
    assert main(["plan", str(root / "demo.yaml"), f"output={root / 'other'}"]) == 0
    assert re.search(r"\b48\b", capsys.readouterr().out), "24 neon clips and 24 plain ones"


def test_no_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo"), "--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err
