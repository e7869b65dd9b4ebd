"""The main job, from clips to weights that diffusers loads, and what is on disk after it."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from finetrainers.config.load import load_config
from finetrainers.demo.clips import render_clips
from finetrainers.folder import read_rows, steps_in
from finetrainers.hashing import file_digest
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.end_to_end.saved import trained_tensors

METHODS = [{"name": "lora", "rank": 4, "alpha": 8}, {"name": "full"}]
STEP_KEYS = {
    *("step", "epoch", "loss", "grad_norm", "lr", "step_time", "data_time", "samples_per_s", "tokens_per_s"),
    "memory_gib",
}


def render(pipeline: LTXPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    return pipeline(prompt="a red circle", generator=generator, output_type="pt", **size).frames


@pytest.mark.parametrize("method", METHODS, ids=["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_clips_to_weights_that_diffusers_loads(settings, tmp_path, model, method, precision):
    settings["method"] = method
    settings["training"]["precision"] = precision
    settings["training"]["gradient_checkpointing"] = True
    code, said = run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")
    assert code == 0, said
    output = Path(settings["output"])

    rows = read_rows(output / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(row.keys() == STEP_KEYS for row in steps)
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 4, 8]
    assert list(steps_in(output / "checkpoints")) == [3, 6, 8]
    assert list(steps_in(output / "weights")) == [3, 6, 8]
    assert (output / "weights" / "latest").resolve().name == "step-00000008"
    assert all(list(folder.glob("*.mp4")) for folder in steps_in(output / "samples").values())
    assert list(steps_in(output / "samples")) == [0, 4, 8]
    assert "<html" in (output / "report.html").read_text()
    repeated = load_config(output / "config.yaml")
    assert repeated.method.name == method["name"] and repeated.optimizer.lr == 1e-3
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]

    pipeline = LTXPipeline.from_pretrained(model)
    before = render(pipeline)
    if method["name"] == "lora":
        pipeline.load_lora_weights(output / "weights" / "latest")
        layers = [module for module in pipeline.transformer.modules() if hasattr(module, "scaling")]
        assert layers and all(set(layer.scaling.values()) == {2.0} for layer in layers), "alpha 8 over rank 4"
    else:
        folder = output / "weights" / "latest" / "transformer"
        pipeline.transformer = LTXVideoTransformer3DModel.from_pretrained(folder)
        expected = torch.float32 if precision == "fp32" else torch.bfloat16
        assert {tensor.dtype for tensor in load_file(next(folder.glob("*.safetensors"))).values()} == {expected}
    assert not torch.allclose(render(pipeline), before, atol=1e-4), "the weights must change what is rendered"


def test_the_lora_file_gives_what_was_trained(settings, tmp_path, model):
    """The reloaded LoRA predicts what the transformer predicted in training, at its own scale."""
    settings["method"]["alpha"] = 24
    settings["data"]["validation"] = None
    code, said = run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")
    assert code == 0, said
    output = Path(settings["output"])
    trained = trained_tensors(output)
    pipeline = LTXPipeline.from_pretrained(model)
    pipeline.load_lora_weights(output / "weights" / "latest")
    compared = 0
    for name, module in pipeline.transformer.named_modules():
        if hasattr(module, "scaling"):
            a, b = (trained[f"transformer.{name}.lora_{part}.default.weight"] for part in "AB")
            torch.testing.assert_close(module.get_delta_weight("default_0"), 24 / 4 * b @ a)
            compared += 1
    assert compared == 2 * 2 * 4, "two blocks, two attentions, four projections"
    with safe_open(output / "weights" / "latest" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (described["transformer.r"], described["transformer.lora_alpha"]) == (4, 24)


def test_the_same_config_gives_the_same_run(settings, tmp_path):
    """Whatever the number of workers: losses to the bit, and the same LoRA file."""
    digests, rows = set(), []
    for number, workers in enumerate([0, 1, 4]):
        settings["output"] = str(tmp_path / f"run-{number}")
        settings["data"]["num_workers"] = workers
        code, said = run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")
        assert code == 0, said
        output = Path(settings["output"])
        digests.add(file_digest(output / "weights" / "latest" / "pytorch_lora_weights.safetensors"))
        rows.append(exact_rows(output))
    assert len(digests) == 1
    assert rows[0] == rows[1] == rows[2]
    settings["training"]["seed"] = 43
    settings["output"] = str(tmp_path / "other")
    assert run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")[0] == 0
    assert exact_rows(Path(settings["output"])) != rows[0]


def test_a_step_is_the_same_however_it_is_cut_into_batches(settings, tmp_path):
    """Four samples at once, by two, or one by one: the same noise levels, and so the same losses but for rounding."""
    clips = render_clips(tmp_path / "clips", 4, num_frames=10, height=64, width=96, fps=16.0).parent
    settings["data"] |= {"train": str(clips), "validation": None}
    settings["validation"]["every"] = 0
    rows = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        settings["training"] |= {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        settings["output"] = str(tmp_path / f"run-{batch_size}")
        code, said = run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")
        assert code == 0, said
        rows.append([(row["loss"], row["grad_norm"]) for row in exact_rows(Path(settings["output"]))])
    for other in rows[1:]:
        assert len(other) == 8
        for (loss, norm), (other_loss, other_norm) in zip(rows[0], other, strict=True):
            assert (other_loss, other_norm) == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3))


def test_nothing_is_encoded_twice(settings, clips, tmp_path):
    """A second run encodes nothing, an edited caption one text, a replaced clip one video."""
    folder = shutil.copytree(clips, tmp_path / "clips")
    settings["data"] |= {"train": str(folder), "cache": str(tmp_path / "cache"), "validation": None}
    settings["validation"]["every"] = 0
    config = write_config(tmp_path / "c.yaml", **settings)

    def encoded() -> set[str]:
        code, said = run(["precompute", config], tmp_path / "log")
        assert code == 0, said
        return {path.parts[-3] + path.name for path in (tmp_path / "cache").rglob("*.safetensors")}

    def new(before: set[str], after: set[str]) -> list[str]:
        assert before <= after, "what was encoded stays"
        return sorted(name[:5] for name in after - before)

    first = encoded()
    kinds = [name[:5] for name in first]
    assert (kinds.count("video"), kinds.count("texts")) == (5, 6), "five clips, five captions and the empty one"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert encoded() == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    table = folder / "metadata.csv"
    rows = list(csv.reader(table.open()))
    rows[1][1] += ", slowly"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    second = encoded()
    assert new(first, second) == ["texts"]
    shutil.copy(folder / rows[1][0], folder / rows[2][0])
    assert new(second, encoded()) == [], "the clip's new content is another clip's, which is there already"


def test_sources_of_every_kind_can_be_repeated(settings, tmp_path):
    """The written config starts the same run again."""
    code, said = run(["train", write_config(tmp_path / "c.yaml", **settings)], tmp_path / "log")
    assert code == 0, said
    written = Path(settings["output"]) / "config.yaml"
    assert yaml.safe_load(written.read_text())["optimizer"]["lr_scheduler"] == "cosine"
    code, said = run(["train", written, f"output={tmp_path / 'again'}"], tmp_path / "log")
    assert code == 0, said
    assert exact_rows(tmp_path / "again") == exact_rows(Path(settings["output"]))
