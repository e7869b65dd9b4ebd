"""No dead options among those that only some families have: each changes what a run computes, or what it renders."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetrainers.folder import LORA_FILE
from finetrainers.hashing import file_digest
from finetrainers.weights import SECOND, read_notes
from tests.end_to_end.runs import exact_rows, run
from tests.end_to_end.test_every_family import Trained
from tests.families.tiny import TINY

QUICK = ("training.steps=2", "validation={every: 2, num_inference_steps: 2, num_videos: 1}")
RIFLEX = "model.rope_temporal={method: riflex, frames: %d}"
# A row, what both runs are given, and what one of them is given more.
CASES = [
    ("cogvideox-5b", (), "objective.loss_weighting=min_snr"),
    ("cogvideox-5b", ("objective.loss_weighting=min_snr",), "objective.snr_gamma=0.01"),
    ("cogvideox-5b-i2v", (), "data.conditions=none"),
    ("cogvideox-5b-i2v", (), "model.learned_positions=remove"),
    ("hunyuan", (), "model.embedded_guidance=6"),
    # Its tiny model has one frequency in time, which is none that RIFLEx would slow down.
    ("hunyuan", (), "model.rope_temporal={method: interpolate, frames: 257}"),
    ("wan-2.1", (), RIFLEX % 2001),
    ("cogvideox-5b", (), RIFLEX % 2001),
    ("wan-2.2-5b-i2v", (), "data.conditions={first: 0}"),
    ("wan-2.2-a14b", (), "model.experts=low_noise"),
    ("wan-2.2-a14b", (), "model.experts=high_noise"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    class Written(dict[str, Trained]):
        def __missing__(self, name: str) -> Trained:
            self[name] = Trained(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Written()


def outcome(models: dict[str, Trained], name: str, *overrides: str) -> Path:
    """A short run on clips that are as long as one of its buckets."""
    output = f"run-{abs(hash(overrides))}"
    done = models[name].root / output
    return done if done.exists() else models[name].train(output, *QUICK, *overrides)


@pytest.mark.parametrize(("name", "given", "override"), CASES)
def test_it_changes_the_numbers(models, name, given, override):
    before, after = outcome(models, name, *given), outcome(models, name, *given, override)
    assert exact_rows(before) != exact_rows(after)


def test_a_table_at_its_own_size_is_the_same_kept_or_resized(models, tmp_path):
    """And a size that is not its own is refused while it is kept."""
    kept = "model.learned_positions=keep"
    row = models["cogvideox-5b-i2v"]
    own = outcome(models, "cogvideox-5b-i2v", f"data.buckets=[{row.row.bucket}]")
    same = outcome(models, "cogvideox-5b-i2v", f"data.buckets=[{row.row.bucket}]", kept)
    assert exact_rows(own) == exact_rows(same)
    config = next(row.root.glob("run-*.yaml"))
    code, said = run(["train", config, kept, f"output={tmp_path / 'x'}"], tmp_path / "log")
    assert code == 2 and "model.learned_positions" in said and "resize" in said and "remove" in said


@pytest.mark.parametrize(("experts", "files"), [("high_noise", {LORA_FILE}), ("low_noise", {f"{SECOND}/{LORA_FILE}"})])
def test_one_expert_is_saved_alone(models, experts, files):
    weights = outcome(models, "wan-2.2-a14b", f"model.experts={experts}") / "weights" / "latest"
    assert {path.relative_to(weights).as_posix() for path in weights.rglob("*.safetensors")} == files


@pytest.mark.parametrize("name", ["cogvideox-5b", "hunyuan", "ltx-0.9.0", "wan-2.1"])
def test_a_longer_time_axis_is_in_the_weights_and_in_what_sample_renders(models, name, tmp_path, monkeypatch):
    """At no strength the LoRA itself changes nothing; its note alone gives other videos, without a flag."""
    trained, rope = models[name], "model.rope_temporal={method: interpolate, frames: 2001}"
    weights = outcome(models, name, rope) / "weights" / "latest" / LORA_FILE
    assert read_notes(weights) == {"rope_temporal": {"method": "interpolate", "frames": 2001}}
    plain = outcome(models, name) / "weights" / "latest"
    assert read_notes(plain / LORA_FILE) == {}
    digests = []
    for number, folder in enumerate((weights.parent, plain)):
        arguments = ["sample", trained.model, "--lora", folder, "--lora-scale", "0", "--prompt", "a red circle"]
        videos = tmp_path / str(number)
        options = ["--size", TINY[name].bucket, "--steps", "2", "--precision", "fp32", "--output", videos]
        code, said = run([*arguments, *options], tmp_path / "log")
        assert code == 0, said
        digests += [file_digest(path) for path in videos.glob("*.mp4")]
    assert len(set(digests)) == 2
