"""The main job on filmed clips: all rates, sizes and codecs in one run."""

from pathlib import Path

from finetrainers.folder import read_rows
from tests.end_to_end.runs import run, write_config


def test_filmed_clips_of_every_kind_train_together(settings, real_clips, tmp_path):
    settings["data"] |= {"train": str(real_clips), "buckets": ["49x64x96", "17x64x64", "9x96x64"], "validation": 0.3}
    settings["validation"]["num_videos"] = 2
    code, said = run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")
    assert code == 0, said
    output = Path(settings["output"])
    assert read_rows(output / "problems.jsonl") == [], "every clip is used"
    rows = read_rows(output / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert len(list((output / "samples" / "step-00000008").glob("*.mp4"))) == 2
    assert len(list((output / "cache" / "videos").rglob("*.safetensors"))) == 7
