"""Compiled blocks: no graph breaks, one program for all layers that are alike, none made twice, and the numbers of
blocks that are not compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetrainers.config.schema import MemoryConfig, ObjectiveConfig
from finetrainers.engines.deepspeed import DeepSpeedEngine
from finetrainers.engines.fsdp import FSDPEngine
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError
from finetrainers.memory.simulation import saved_bytes
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.training.compiling import check_compiling, compile_blocks, is_compiled
from finetrainers.training.models import load_models
from finetrainers.training.simulated import blank_batch
from finetrainers.types import Batch, Bucket, Condition
from tests.families.deep import write_deep
from tests.families.rows import Row
from tests.families.tiny import TINY
from tests.training.tiny_run import full, lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NAMES = [name for name in TINY if not name.startswith("own") and name != "ltx-bundled"]
QUICK = ("cogvideox-5b", "hunyuan", "ltx-0.9.5", "wan-2.1", "wan-2.2-a14b")
LAYERS = 4
Programs = list[torch.fx.GraphModule]


def open_method(row: Row, folder: Path, name: str = "lora") -> Method:
    family = row.open(folder)
    objective = build_objective(
        ObjectiveConfig(timestep_sampling="uniform", shift=1.0),
        alphas_cumprod=family.alphas_cumprod(),
        noise_range=family.noise_range,
    )
    options = lora(target_modules=TARGETS) if name == "lora" else full()
    return find_method(options, family, objective, dtype=torch.float32)


def load(method: Method, tmp_path: Path, *, checkpointing: str = "none", **memory: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    models, trained = load_models(
        method,
        SingleEngine(),
        options=MemoryConfig(**memory),
        seed=1,
        checkpointing=checkpointing,
        kept_in=tmp_path,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained.values():
            # Adapters begin as zeros, of which half have no gradient.
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.01).to(parameter.device))
    return models


def batch_of(method: Method, size: Bucket, condition: Condition) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor

    blank = blank_batch(method, size, condition)
    return dataclasses.replace(
        blank,
        latents_BCFHW=drawn(blank.latents_BCFHW),
        noise_BCFHW=drawn(blank.noise_BCFHW),
        text={name: drawn(tensor) for name, tensor in blank.text.items()},
    )


def compile_all(
    method: Method, models: dict[str, Any], backend: Callable[[torch.fx.GraphModule, Any], Any] | str
) -> None:
    for name, model in models.items():
        compile_blocks(method.family.blocks(name, model), backend=backend)


@pytest.fixture
def programs() -> Programs:
    """Every program that dynamo hands to `counted`."""
    torch.compiler.reset()
    return []


def counted(programs: Programs) -> Callable[[torch.fx.GraphModule, Any], Any]:
    def backend(program: torch.fx.GraphModule, inputs: Any) -> Any:
        programs.append(program)
        return program.forward

    return backend


def losses_of(method: Method, models: dict[str, Any], batches: list[Batch]) -> list[float]:
    losses = []
    for batch in batches:
        loss = method.loss(models, batch).mean()
        loss.backward()
        losses.append(loss.item())
    return losses


def kinds_of(method: Method, models: dict[str, Any]) -> int:
    return len({type(block) for name, model in models.items() for block in method.family.blocks(name, model)})


def quick(names: Sequence[str]) -> list[Any]:
    """All names, those that are not among these marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", quick(QUICK))
def test_one_program_serves_all_layers(name, tmp_path, programs):
    """Of each kind at most two, because the input of the first layer needs no gradient; none is made twice."""
    row = TINY[name]
    method = open_method(row, write_deep(name, tmp_path / "model", num_layers=LAYERS))
    models = load(method, tmp_path)
    condition = Condition.parse(row.conditions[0])
    sizes = [Bucket.parse(size) for size in (row.bucket, row.other_bucket)]
    # At a noise level for each of two experts, which share their programs.
    batches = [
        dataclasses.replace(batch_of(method, size, condition), level_B=torch.tensor([level]))
        for size in sizes
        for level in (0.5, 0.99)
    ]
    expected = losses_of(method, models, batches)
    compile_all(method, models, counted(programs))
    assert losses_of(method, models, batches) == expected
    assert len(programs) <= 2 * len(sizes) * kinds_of(method, models)
    assert len(programs) >= len(sizes) * kinds_of(method, models)
    assert all(parameter.grad is not None for parameter in method.trained(models).values()), "each expert was asked"
    seen = len(programs)
    losses_of(method, models, batches)
    assert len(programs) == seen


def test_none_is_made_twice_over_eight_sizes(tmp_path, programs):
    method = open_method(TINY["ltx-0.9.5"], TINY["ltx-0.9.5"].write(tmp_path / "model"))
    models = load(method, tmp_path)
    compile_all(method, models, counted(programs))
    # Of so many tokens each; programs know no more of a size.
    sizes = [Bucket(9, 32, 32 * number) for number in range(2, 10)]
    batches = [batch_of(method, size, Condition()) for size in sizes]
    losses_of(method, models, batches)
    assert len(programs) == 2 * len(sizes)
    losses_of(method, models, batches[::-1])
    assert len(programs) == 2 * len(sizes)


def test_activations_that_a_matrix_product_reads_are_computed_again():
    """Of a feed-forward what goes in is kept and what the activation takes, not what it gives."""
    torch.compiler.reset()
    block = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    hidden = torch.randn(16, 8)
    expected = block(hidden)
    compile_blocks([block], backend="aot_eager_decomp_partition")
    assert saved_bytes(lambda: block(hidden), [block]) == 16 * (8 + 32) * 4
    assert torch.allclose(block(hidden), expected)


CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "checkpointing": {"checkpointing": "full"},
    "every second block": {"checkpointing": "every-2"},
    "attention": {"checkpointing": "attention"},
    "feed-forward": {"checkpointing": "feed_forward"},
    "offload": {"offload_activations": True, "checkpointing": "full"},
    "streaming": {"stream_blocks": "all", "checkpointing": "full"},
    "int8": {"base_weights": "int8"},
    "fp8": {"base_weights": "fp8"},
    "nf4": {"base_weights": "nf4"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_saves_memory_is_compiled_too(case, tmp_path, programs):
    options = dict(CASES[case])
    method = open_method(
        TINY["wan-2.1"], write_deep("wan-2.1", tmp_path / "model", num_layers=3), options.pop("method", "lora")
    )
    batches = [batch_of(method, Bucket.parse(TINY["wan-2.1"].bucket), Condition())]
    answers = []
    for compiles in (False, True):
        models = load(method, tmp_path, **options)
        if compiles:
            compile_all(method, models, counted(programs))
        losses = losses_of(method, models, batches)
        answers.append((losses, [parameter.grad for parameter in method.trained(models).values()]))
    assert 1 <= len(programs) <= 3
    assert answers[0][0] == answers[1][0]
    assert all(torch.equal(*pair) for pair in zip(answers[0][1], answers[1][1], strict=True))


def assert_same_gradients(name: str, tmp_path: Path, kind: str, *, most: float) -> None:
    """Of blocks that inductor compiled and of others, on the device that there is; `most` is of each parameter's
    largest."""
    torch.compiler.reset()
    row, device = TINY[name], SingleEngine().device
    method = open_method(row, row.write(tmp_path / "model"), kind)
    condition = Condition.parse(row.conditions[0])
    sizes = [Bucket.parse(size) for size in (row.bucket, row.other_bucket)]
    batches = [batch_of(method, size, condition).map(lambda tensor: tensor.to(device)) for size in sizes]
    answers = []
    for compiles in (False, True):
        models = load(method, tmp_path)
        if compiles:
            compile_all(method, models, "inductor")
            assert not any("_orig_mod" in key for model in models.values() for key in model.state_dict())
        losses = losses_of(method, models, batches)
        answers.append((losses, {key: each.grad for key, each in method.trained(models).items()}))
    assert answers[1][0] == pytest.approx(answers[0][0], rel=1e-5)
    # Of two experts one was asked. What is zero but for rounding, as that of a bias of keys, rounds as what it sums.
    gradients = {key: each for key, each in answers[0][1].items() if each is not None}
    rounding = 1e-7 * max(each.abs().max() for each in gradients.values())
    for key, gradient in gradients.items():
        assert (answers[1][1][key] - gradient).abs().max() <= max(most * gradient.abs().max(), rounding), key


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", quick([]))
def test_gradients_are_those_of_blocks_that_are_not_compiled(name, kind, tmp_path):
    assert_same_gradients(name, tmp_path, kind, most=3e-5)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", QUICK)
def test_gradients_are_the_same_on_a_gpu(name, kind, tmp_path):
    assert_same_gradients(name, tmp_path, kind, most=1e-3)


def engine(device: str = "cpu", **more: Any) -> Any:
    return SimpleNamespace(**{"device": torch.device(device), "within_blocks": lambda dtype: None, **more})


def test_auto_is_for_gpus():
    chosen = {
        (option, device): is_compiled(option, engine(device), None)
        for option in ("auto", "off", "blocks")
        for device in ("cpu", "cuda")
    }
    on_gpu = chosen.pop(("auto", "cuda")), chosen.pop(("blocks", "cuda"))
    assert chosen == {("auto", "cpu"): False, ("off", "cpu"): False, ("off", "cuda"): False, ("blocks", "cpu"): True}
    # Where triton is, as it is wherever torch was built for CUDA.
    assert on_gpu == ((find_spec("triton") is not None),) * 2


REFUSED = {
    "ZeRO stage 3": (DeepSpeedEngine, {"stage": 3}),
    "split tokens": (SingleEngine, {"context_size": 2}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compiled_is_refused(reason):
    kind, state = REFUSED[reason]
    run = engine(within_blocks=lambda dtype: kind.within_blocks(SimpleNamespace(**state), dtype))
    with pytest.raises(UserError, match=rf"training.compile blocks: .*{reason}.*set training.compile off"):
        check_compiling("blocks", run)
    for option in ("auto", "off"):
        check_compiling(option, run)
        assert not is_compiled(option, run, None)
    assert SingleEngine().within_blocks(None) is None


def test_what_an_engine_does_within_blocks_to_send_less_is_done_without_where_asked(caplog):
    """fsdp's bf16 of full fine-tuning: `auto` leaves it alone, `blocks` compiles."""
    fsdp = engine("cuda", within_blocks=lambda dtype: FSDPEngine.within_blocks(FSDPEngine.__new__(FSDPEngine), dtype))
    with caplog.at_level("INFO"):
        assert not is_compiled("auto", fsdp, torch.bfloat16)
    if find_spec("triton") is not None:
        assert "to send half as much; training.compile=blocks does without" in caplog.text
    fsdp.device = torch.device("cpu")
    check_compiling("blocks", fsdp)
    assert is_compiled("blocks", fsdp, torch.bfloat16)
    assert fsdp.within_blocks(torch.bfloat16) and fsdp.within_blocks(None) is None
