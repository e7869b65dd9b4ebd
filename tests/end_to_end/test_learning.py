"""Training teaches: full fine-tuning of the bundled model reaches a stated held-out loss in a minute."""

from pathlib import Path

import pytest
import yaml

from finetrainers.cli import main
from finetrainers.commands.demo import demo_settings, held_out_losses, write_clips
from finetrainers.demo.bundled import copy_bundled_model
from finetrainers.folder import RunFolder

HELD_OUT_LOSS = 0.75
"""Full fine-tuning reached 0.66 in so few steps; before the first it is 7.44."""


@pytest.mark.timeout(600)
def test_full_fine_tuning_lowers_the_held_out_loss(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips")
    copy_bundled_model(tmp_path / "model")
    run = RunFolder(tmp_path / "run")
    settings = demo_settings(tmp_path, run, 60)
    settings["method"] = {"name": "full"}
    settings["optimizer"] = {"name": "muon", "lr": 1e-3}
    settings["validation"] = {"every": 60, "num_videos": 0}
    config = tmp_path / "full.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config)]) == 0
    before, after = held_out_losses(run)
    assert before > 4
    assert after < HELD_OUT_LOSS
