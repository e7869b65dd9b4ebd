"""From the `parallel` section to the engine: what `auto` takes, and what is refused."""

from __future__ import annotations

import json

import pytest

from finetrainers.commands import opening
from finetrainers.commands.completing import complete
from finetrainers.config.load import build_config
from finetrainers.config.schema import ParallelConfig
from finetrainers.engines.build import build_engine, check_options, pick_strategy
from finetrainers.engines.deepspeed import read_user_settings, zero_settings
from finetrainers.errors import UserError


def run_config(folder, tmp_path, **sections):
    return build_config(
        {"model": {"path": str(folder)}, "data": {"train": str(tmp_path), "buckets": ["9x64x96"]}, "output": "x"}
        | sections
    )


def test_auto_is_ddp_where_it_fits():
    assert [pick_strategy(states, 80.0) for states in (1.0, 55.0, 57.0, 500.0)] == ["ddp", "ddp", "fsdp", "fsdp"]


@pytest.mark.parametrize(
    ("name", "sections", "device_gib", "strategy"),
    [
        ("ltx-0.9.5-i2v", {}, 1.0, "ddp"),
        # 0.05 million parameters in fp32 with gradients and two moments are 0.8 MB, their LoRA alone far less.
        ("ltx-0.9.5-i2v", {"method": {"name": "full"}}, 0.0009, "fsdp"),
        ("ltx-0.9.5-i2v", {"method": {"name": "lora", "rank": 4}}, 0.0009, "ddp"),
        ("ltx-0.9.5-i2v", {"method": {"name": "full"}, "optimizer": {"name": "adamw_8bit"}}, 0.0001, "ddp"),
        ("ltx-0.9.5-i2v", {"memory": {"stream_blocks": "all"}}, 0.0001, "ddp"),
        ("ltx-0.9.5-i2v", {"memory": {"base_weights": "int8"}}, 0.0001, "ddp"),
        ("wan-2.2-a14b", {}, 0.0001, "ddp"),
    ],
)
def test_auto_looks_at_what_a_process_would_hold(folders, tmp_path, monkeypatch, name, sections, device_gib, strategy):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(opening, "device_gib", lambda: device_gib)
    assert opening.plain_strategy(*complete(run_config(folders[name], tmp_path, **sections))).strategy == strategy


def test_one_process_needs_no_engine_of_several(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = run_config(folders["ltx-0.9.5-i2v"], tmp_path)
    assert opening.plain_strategy(*complete(config)).strategy == "auto"
    assert build_engine(config.parallel).world_size == 1
    for strategy in ("ddp", "fsdp", "deepspeed"):
        with pytest.raises(UserError, match=f"{strategy} runs on several processes; start them with --nproc"):
            build_engine(ParallelConfig(strategy=strategy))


REFUSED = [
    ({"strategy": "ddp", "shard_size": 2}, "parallel.shard_size is an option of parallel.strategy fsdp"),
    ({"strategy": "ddp", "offload": "parameters"}, "parallel.offload is an option of parallel.strategy fsdp and deep"),
    ({"strategy": "fsdp", "zero_stage": 3}, "parallel.zero_stage is an option of parallel.strategy deepspeed"),
    ({"strategy": "fsdp", "offload": "optimizer"}, "parallel.offload optimizer is for deepspeed"),
    ({"strategy": "fsdp", "deepspeed_config": "x.json"}, "parallel.deepspeed_config is an option of"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_an_option_that_the_strategy_does_not_have_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        check_options(options["strategy"], ParallelConfig(**options))


def test_a_users_own_deepspeed_json(tmp_path):
    """As other tools have it, with values left to the tool; what our config decides stays ours."""
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "bf16": {"enabled": "auto"},
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
                "wall_clock_breakdown": True,
            }
        )
    )
    user = read_user_settings(path)
    settings = zero_settings(stage=None, offload="none", user=user)
    assert settings["wall_clock_breakdown"] and settings["zero_optimization"]["overlap_comm"]
    assert settings["zero_optimization"]["stage"] == 3
    assert "reduce_bucket_size" not in settings["zero_optimization"] and "train_batch_size" not in settings
    assert zero_settings(stage=3, offload="parameters", user=user)["zero_optimization"]["offload_param"] == {
        "device": "cpu"
    }
    assert zero_settings(stage=None, offload="none", user=None)["zero_optimization"]["stage"] == 2


WRONG = [
    ({"optimizer": {"type": "Adam"}}, {}, "optimizer is decided by the optimizer section; remove it"),
    ({"bf16": {"enabled": True}}, {}, "bf16 is decided by training.precision"),
    ({"gradient_clipping": 1.0}, {}, "gradient_clipping is decided by training.max_grad_norm"),
    ({"zero_optimization": {"stage": 3}}, {"stage": 2}, "zero_stage is 2, and .* says stage 3; remove one"),
    ({}, {"stage": 2, "offload": "parameters"}, "parallel.offload parameters needs parallel.zero_stage 3"),
]


@pytest.mark.parametrize(("user", "options", "said"), WRONG)
def test_what_deepspeed_cannot_be_told(user, options, said):
    with pytest.raises(UserError, match=said):
        zero_settings(**({"stage": None, "offload": "none"} | options), user=user)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_deepspeed_json_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=r"parallel\.deepspeed_config .*(JSON)"):
        read_user_settings(tmp_path / "ds.json")
