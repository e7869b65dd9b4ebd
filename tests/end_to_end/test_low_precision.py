"""Whole runs with weights in low precision: resumed, exported, on several processes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetrainers.commands.completing import complete
from finetrainers.config.load import load_config
from finetrainers.errors import UserError
from finetrainers.folder import read_rows
from finetrainers.weights import SECOND
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.end_to_end.saved import trained_tensors
from tests.end_to_end.test_every_family import Trained, plain_pipeline, rendered
from tests.engines.tiny_runs import assert_close, settings
from tests.engines.together import run_together
from tests.families.parity import transformers_of

CASES = {"ltx-0.9.5-i2v": "fp8", "cogvideox-1.5-i2v": "int8", "hunyuan-i2v": "nf4", "wan-2.2-a14b": "fp8"}
"""Each family, and each format."""


class Quantized(Trained):
    """Runs with the frozen weights and the text encoder in low precision."""

    def settings(self) -> dict[str, Any]:
        format = CASES[self.name]
        memory = {"base_weights": format, "text_encoder_weights": format, "keep_quantized": True}
        return super().settings() | {"memory": memory}


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return Quantized(request.param, tmp_path_factory.mktemp(request.param))


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = trained_tensors(one), trained_tensors(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_a_run_renders_and_its_lora_loads_beside_the_base_weights(trained):
    output = trained.lora
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in read_rows(output / "metrics.jsonl") if "loss" in row)
    assert len(list((output / "samples").rglob("*.mp4"))) == 2
    weights, checkpoint, pipeline = output / "weights" / "latest", trained_tensors(output), plain_pipeline(trained)
    before = rendered(trained.row, trained.model, pipeline)
    pipeline.load_lora_weights(weights)
    if (weights / SECOND).exists():
        pipeline.load_lora_weights(weights / SECOND, load_into_transformer_2=True)
    compared = 0
    for part, transformer in transformers_of(pipeline).items():
        for name, module in transformer.named_modules():
            if getattr(module, "scaling", None):
                a, b = (checkpoint[f"{part}.{name}.lora_{letter}.default.weight"] for letter in "AB")
                torch.testing.assert_close(module.get_delta_weight(*module.scaling), 8 / 4 * b @ a)
                compared += 2
    assert compared == len(checkpoint), "nothing but adapters is saved"
    assert not torch.equal(rendered(trained.row, trained.model, pipeline), before)


def test_a_run_cut_in_two_is_the_same_run(trained):
    whole = trained.lora
    trained.train("halves", "training.steps=3")
    halves = trained.train("halves")
    assert exact_rows(halves) == exact_rows(whole) and same_tensors(halves, whole)
    said = (trained.root / "halves.log").read_text()
    assert "linear layers are held in" in said and "are read from" in said


def test_keeping_changes_no_number_and_losses_are_near_the_plain_ones(trained):
    whole = trained.lora
    assert list((trained.root / "cache" / "weights").glob("*.safetensors"))
    afresh = trained.train("afresh", "memory.keep_quantized=false", "validation.every=0")
    plain = trained.train("plain", "memory={}", "validation.every=0")
    steps = [[row["loss"] for row in exact_rows(run) if "loss" in row] for run in (whole, afresh, plain)]
    assert steps[0] == steps[1] and same_tensors(whole, afresh)
    assert steps[0] != steps[2] and steps[0] == pytest.approx(steps[2], rel=0.05)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("format", ["fp8", "nf4"])
def test_two_processes_are_one(folders, clips, tmp_path, format):
    """One of them reads the model, makes the codes and hands them on."""
    name = "wan-2.2-5b-i2v" if format == "fp8" else "ltx-0.9.5-i2v"
    options = settings(name, folders[name], clips, tmp_path) | {"memory": {"base_weights": format}}
    options["training"] |= {"steps": 8}
    config = write_config(tmp_path / "c.yaml", **options, output="-")
    command = ["train", config, f"output={tmp_path / 'alone'}", "training.gradient_accumulation_steps=2"]
    code, said = run(command, tmp_path / "alone.log")
    assert code == 0, said
    commands = [["train", config, f"output={tmp_path / 'two'}", "parallel.strategy=ddp"]]
    commands.append(
        ["train", config, f"output={tmp_path / 'split'}", "training.gradient_accumulation_steps=2",
         "parallel.strategy=ddp", "parallel.context_parallel_size=2"]
    )  # fmt: skip
    said = run_together(2, commands, tmp_path / "together.log")
    assert said.count("linear layers are held in") == len(commands) and "ddp on 2 processes" in said
    for name in ("two", "split"):
        assert_close(tmp_path / "alone", tmp_path / name)


REFUSED = {
    "method.name=full": ["memory.base_weights fp8", "take method.name lora"],
    "parallel.strategy=fsdp": ["leaves each process the whole model", "take parallel.strategy ddp"],
    "method={name: lora, text_encoder: lora}": ["memory.text_encoder_weights int8", "method.text_encoder lora"],
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(folders, clips, tmp_path, option):
    memory = {"base_weights": "fp8", "text_encoder_weights": "int8"}
    sections = {"model": {"path": str(folders["ltx-0.9.0"])}, "data": {"train": str(clips)}, "memory": memory}
    config = write_config(tmp_path / "c.yaml", **sections, output=str(tmp_path / "run"))
    with pytest.raises(UserError) as refused:
        complete(load_config(config, [option]))
    assert all(words in str(refused.value) for words in REFUSED[option]) and "\n" not in str(refused.value)
