"""A run in float8: it goes on exactly, under the same recipe alone, and what it leaves loads in diffusers."""

from __future__ import annotations

from diffusers import LTXVideoTransformer3DModel

from tests.end_to_end.runs import exact_rows, run, write_config
from tests.end_to_end.test_resume import assert_same_run


def test_a_run_cut_in_two_is_the_same_run(settings, model, tmp_path):
    settings["method"] = {"name": "full", "float8_recipe": "rowwise"}
    settings["optimizer"]["lr_scheduler"] = "constant"
    settings["training"] |= {"precision": "bf16", "gradient_checkpointing": True}
    settings["checkpoint"]["every"] = 4
    settings["validation"]["num_videos"] = 0
    config = write_config(tmp_path / "c.yaml", **settings)

    def train(name: str, *options: str) -> tuple[int, str]:
        return run(["train", config, f"output={tmp_path / name}", *options], tmp_path / f"{name}.log")

    code, said = train("whole")
    assert code == 0, said
    assert "of 20 linear layers of the blocks 20 compute in float8 (rowwise, emulated" in said
    assert train("halves", "training.steps=5")[0] == 0
    code, said = train("halves", "method.float8_recipe=tensorwise")
    assert code == 2 and "method.float8_recipe was 'rowwise' and is 'tensorwise'" in said, said
    code, said = train("halves", "method.float8_recipe=null")
    assert code == 2 and "method.float8_recipe was 'rowwise' and is None" in said, said
    # Where weights lie changes no number.
    code, said = train("halves", "memory.stream_blocks=all", "memory.offload_activations=true")
    assert code == 0 and "resumed from" in said and "blocks of transformer are streamed" in said, said
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    folder = tmp_path / "whole" / "weights" / "latest" / "transformer"
    loaded, report = LTXVideoTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    base = LTXVideoTransformer3DModel.from_pretrained(model, subfolder="transformer")
    assert not any(report.values()) and loaded.state_dict().keys() == base.state_dict().keys()
    assert train("plain", "method.float8_recipe=null")[0] == 0
    losses = [[row["loss"] for row in exact_rows(tmp_path / name) if "loss" in row] for name in ("whole", "plain")]
    assert losses[0] != losses[1]
