"""A run goes on from its checkpoint on other processes and under another engine, and exactly where nothing changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from finetrainers.folder import steps_in
from tests.end_to_end.runs import exact_rows, run, write_config
from tests.engines.tiny_runs import METHODS, assert_close, settings
from tests.engines.together import run_together

pytestmark = pytest.mark.timeout(600)


def config_of(folders, clips, tmp_path, **validation):
    options = settings("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"], clips, tmp_path)
    if validation:
        options["data"]["validation"] = 0.3
        options["validation"] = validation
    return write_config(tmp_path / "c.yaml", **options, output="-")


def command(config, output, method, engine, *, steps, accumulated):
    chosen = [f"parallel.{key}={value}" for key, value in engine.items()]
    steps, accumulated = f"training.steps={steps}", f"training.gradient_accumulation_steps={accumulated}"
    return ["train", config, METHODS[method], f"output={output}", steps, accumulated, *chosen]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_wanders_over_processes_and_engines(folders, clips, tmp_path, method):
    """Four processes of FSDP in groups of two, then two of DDP, two of FSDP, four of FSDP, and one alone: losses, held-
    out losses, norms, weights and sample videos are those of one process, and each clip is seen as often."""
    config = config_of(folders, clips, tmp_path, every=5, num_inference_steps=2, num_videos=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said = run(command(config, whole, method, {}, steps=20, accumulated=4), tmp_path / "log")
    assert code == 0, said
    legs = [
        (4, {"strategy": "fsdp", "shard_size": 2}, 4),
        (2, {"strategy": "ddp"}, 8),
        (2, {"strategy": "fsdp"}, 12),
        (4, {"strategy": "fsdp", "offload": "parameters"}, 16),
    ]
    for count, engine, steps in legs:
        go_on = command(config, parts, method, engine, steps=steps, accumulated=4 // count)
        said = run_together(count, [go_on], tmp_path / "log")
    assert said.count("resumed from") == len(legs) - 1
    code, said = run(command(config, parts, method, {}, steps=20, accumulated=4), tmp_path / "log")
    assert code == 0, said
    assert_close(whole, parts)
    for output in (whole, parts):
        assert list(steps_in(output / "samples")) == [0, 5, 10, 15, 20]
        assert all(len(list(folder.glob("*.mp4"))) == 1 for folder in steps_in(output / "samples").values())
    states = [
        json.loads((list(steps_in(r / "checkpoints").values())[-1] / "state.json").read_text()) for r in (whole, parts)
    ]
    assert states[0]["train"] == states[1]["train"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "engine",
    [
        {"strategy": "ddp"},
        {"strategy": "fsdp"},
        {"strategy": "deepspeed", "zero_stage": 2},
        {"strategy": "deepspeed", "zero_stage": 3, "offload": "parameters"},
    ],
    ids=["ddp", "fsdp", "zero2", "zero3"],
)
def test_the_same_processes_go_on_exactly(folders, clips, tmp_path, method, engine):
    config = config_of(folders, clips, tmp_path)
    outputs = [(tmp_path / "whole", 8), (tmp_path / "parts", 5), (tmp_path / "parts", 8)]
    commands = [command(config, output, method, engine, steps=steps, accumulated=1) for output, steps in outputs]
    assert "resumed from" in run_together(2, commands, tmp_path / "log")
    assert exact_rows(tmp_path / "whole") == exact_rows(tmp_path / "parts") != []


def test_deepspeed_goes_on_with_deepspeed_on_as_many_processes(folders, clips, tmp_path):
    config = config_of(folders, clips, tmp_path)
    deepspeed = {"strategy": "deepspeed", "zero_stage": 2}
    run_together(2, [command(config, tmp_path / "run", "lora", deepspeed, steps=3, accumulated=2)], tmp_path / "log")
    for count, engine, expected in (
        (1, {}, "was saved by deepspeed stage 2 on 2 processes"),
        (2, {"strategy": "fsdp"}, "was saved by deepspeed stage 2 on 2 processes"),
        (4, deepspeed, "was saved by deepspeed stage 2 on 2 processes"),
    ):
        go_on = command(config, tmp_path / "run", "lora", engine, steps=5, accumulated=4 // count)
        with pytest.raises(AssertionError, match=expected):
            run_together(count, [go_on], tmp_path / "log2")
    ddp = {"strategy": "ddp"}
    run_together(2, [command(config, tmp_path / "other", "lora", ddp, steps=3, accumulated=2)], tmp_path / "log")
    with pytest.raises(AssertionError, match="was saved by ddp"):
        go_on = command(config, tmp_path / "other", "lora", deepspeed, steps=5, accumulated=2)
        run_together(2, [go_on], tmp_path / "log2")


def test_bf16_is_the_same_sharded_with_activations_computed_again(folders, clips, tmp_path):
    """Weights travel in bf16 there; the numbers are those of DDP, whose arithmetic is bf16 as well."""
    config = config_of(folders, clips, tmp_path, every=4, num_inference_steps=2, num_videos=1)
    extra = ["training.precision=bf16", "training.gradient_checkpointing=true"]
    for method in METHODS:
        commands = [
            [
                *command(config, tmp_path / f"{method}-{name}", method, {"strategy": name}, steps=8, accumulated=1),
                *extra,
            ]
            for name in ("ddp", "fsdp")
        ]
        run_together(2, commands, tmp_path / "log")
        ours, theirs = (exact_rows(tmp_path / f"{method}-{name}") for name in ("ddp", "fsdp"))
        # From the second step on, rounding in bf16 (2^-8) makes more of the order in which gradients are added.
        assert ours[:2] == [pytest.approx(row, rel=1e-5) for row in theirs[:2]], method
        assert ours == [pytest.approx(row, rel=5e-3) for row in theirs], method


def test_adapters_are_fp32_beside_frozen_bf16(folders, clips, tmp_path):
    """Under each engine: in the file that a user takes away, which is written as they are, they have more than bf16."""
    config = config_of(folders, clips, tmp_path)
    engines = [
        {"strategy": "ddp"},
        {"strategy": "fsdp"},
        {"strategy": "deepspeed", "zero_stage": 1},
        {"strategy": "deepspeed", "zero_stage": 2},
        {"strategy": "deepspeed", "zero_stage": 3},
    ]
    commands = [
        [*command(config, tmp_path / str(number), "lora", engine, steps=3, accumulated=1), "training.precision=bf16"]
        for number, engine in enumerate(engines)
    ]
    run_together(2, commands, tmp_path / "log")
    losses = [[row["loss"] for row in exact_rows(tmp_path / str(number))] for number in range(len(engines))]
    assert losses == [pytest.approx(losses[0], rel=5e-3)] * len(engines)
    for number, engine in enumerate(engines):
        (file,) = (tmp_path / str(number) / "weights" / "latest").glob("*.safetensors")
        for name, tensor in load_file(file).items():
            assert tensor.dtype == torch.float32, engine
            assert not torch.equal(tensor, tensor.bfloat16().float()), (engine, name)


def test_both_experts_train_under_ddp_alone(folders, clips, tmp_path):
    name = "wan-2.2-a14b"
    config = write_config(tmp_path / "c.yaml", **settings(name, folders[name], clips, tmp_path), output="-")
    whole = tmp_path / "whole"
    code, said = run(command(config, whole, "lora", {}, steps=20, accumulated=4), tmp_path / "log")
    assert code == 0, said
    both = command(config, tmp_path / "both", "lora", {"strategy": "ddp"}, steps=20, accumulated=2)
    run_together(2, [both], tmp_path / "log")
    assert_close(whole, tmp_path / "both")
    for strategy in ("fsdp", "deepspeed"):
        refused = command(config, tmp_path / "refused", "lora", {"strategy": strategy}, steps=20, accumulated=2)
        with pytest.raises(AssertionError, match="trains one expert at a time"):
            run_together(2, [refused], tmp_path / "log")
    one = command(config, tmp_path / "one", "lora", {"strategy": "fsdp"}, steps=2, accumulated=2)
    run_together(2, [[*one, "model.experts=low_noise"]], tmp_path / "log")


def test_eight_bit_state_is_refused_where_it_would_be_shared(folders, clips, tmp_path):
    config = config_of(folders, clips, tmp_path)
    refused = command(config, tmp_path / "refused", "lora", {"strategy": "fsdp"}, steps=2, accumulated=2)
    with pytest.raises(AssertionError, match="adamw_8bit keeps its state whole"):
        run_together(2, [[*refused, "optimizer.name=adamw_8bit"]], tmp_path / "log")
    assert not torch.distributed.is_initialized()
