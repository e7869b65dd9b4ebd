"""Linear layers in float8: which they are, what they compute, and that nothing else of a run is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetrainers.config.schema import MemoryConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError
from finetrainers.float8 import Float8Linear, choose_layers, compute_in_float8
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.training.models import load_models
from finetrainers.training.saving import gather_weights
from finetrainers.training.simulated import meta_models
from finetrainers.types import Batch
from tests.families.deep import write_deep
from tests.families.tiny import TINY
from tests.memory.training import random_batch
from tests.training.test_compiling import Programs, compile_all, counted, kinds_of
from tests.training.tiny_run import OBJECTIVE, full, make_batch, make_trainer

RECIPES = ("tensorwise", "rowwise")
CODES = {"tensorwise": torch.float8_e5m2, "rowwise": torch.float8_e4m3fn}
"""What gradients are rounded to."""


def rounded(tensor: Tensor, recipe: str, dim: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """The numbers that float8 makes of these: with a scale that brings the largest of all, or of those that are summed
    over along `dim`, to the largest that the type reaches; by rows a power of two."""
    tensor = tensor.float()
    largest = tensor.abs().max() if recipe == "tensorwise" else tensor.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.double().clamp(min=1e-12)).float()
    if recipe == "rowwise":
        scale = scale.log2().floor().exp2()
    return (tensor * scale).to(dtype).double() / scale.double()


@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "by torch"])
@pytest.mark.parametrize("num_tokens", [32, 18])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_are_those_of_rounded_numbers(recipe, weights, num_tokens, emulate):
    """Also of a number of tokens that is no multiple of 16, and of fp32 inputs under autocast. torch has float8
    products for CPUs too, so that what a GPU is asked for runs here."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(48, 32, dtype=weights)
    model = nn.Sequential(plain)
    given = torch.randn(2, num_tokens // 2, 48, generator=generator).to(weights).requires_grad_()
    slope = torch.randn(2, num_tokens // 2, 32, generator=generator).bfloat16()
    compute_in_float8(model, ["0"], recipe, emulate=emulate)
    assert model[0].weight is plain.weight and model[0].bias is plain.bias
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != torch.bfloat16):
        answer = model(given)
    answer.backward(slope)
    tokens, slopes = given.detach().bfloat16().flatten(0, 1), slope.flatten(0, 1)
    weight = plain.weight.detach()
    expected = {
        "answer": rounded(tokens, recipe, 1) @ rounded(weight, recipe, 1).T,
        "input": rounded(slopes, recipe, 1, CODES[recipe]) @ rounded(weight, recipe, 0),
        "weight": rounded(slopes, recipe, 0, CODES[recipe]).T @ rounded(tokens, recipe, 0),
    }
    found = {
        "answer": answer.detach().flatten(0, 1).double() - plain.bias.detach().double(),
        "input": given.grad.flatten(0, 1).double(),
        "weight": plain.weight.grad.double(),
    }
    exact = {
        "answer": tokens.double() @ weight.double().T,
        "input": slopes.double() @ weight.double(),
        "weight": slopes.double().T @ tokens.double(),
    }
    assert answer.dtype == torch.bfloat16 and plain.weight.grad.dtype == weights
    for name, product in expected.items():
        size = product.abs().max()
        # bf16 rounds the answer, and the bias's sum once more.
        assert (found[name] - product).abs().max() < 2**-7 * size, name
        assert (exact[name] - product).norm() > 0.01 * product.norm(), "float8 rounds"
    torch.testing.assert_close(plain.bias.grad.float(), slopes.float().sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("num_tokens", "rows"), [(32, 32), (18, 32), (1, 16)])
def test_a_gpu_gets_sizes_that_it_takes(num_tokens, rows):
    """What is summed over is a multiple of 16 in every product: sizes of the weight, and tokens with what is added."""
    saved: list[tuple[Any, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    model = nn.Sequential(nn.Linear(48, 32))
    compute_in_float8(model, ["0"], "tensorwise", emulate=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        answer = model(torch.ones(num_tokens, 48))
    assert answer.shape == (num_tokens, 32)
    assert saved == [((rows, 48), torch.bfloat16), ((48, 32), torch.float32)], "of the weight itself, no copy"


def test_sizes_that_do_not_suit_and_named_layers_are_left_out():
    sizes = [(32, 48), (24, 48), (48, 40), (16, 16)]
    model = nn.ModuleDict({"block": nn.Sequential(*(nn.Linear(*size) for size in sizes)), "outside": nn.Linear(32, 32)})
    assert choose_layers(model, [model["block"]], leave=[]) == ["block.0", "block.3"]
    assert choose_layers(model, [model["block"]], leave=["embed", r"\.3"]) == ["block.0"]


def float8_method(row: str, folder: Path, recipe: str | None = "tensorwise", **options: Any) -> Method:
    options = {"float8_recipe": recipe} | options
    return find_method(full(**options), TINY[row].open(folder), OBJECTIVE, dtype=torch.bfloat16)


def load(method: Method, *, checkpointing: str = "none", **memory: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    options = MemoryConfig(**memory)
    return load_models(
        method, SingleEngine(), options=options, seed=1, checkpointing=checkpointing, kept_in=Path()
    )[0]  # fmt: skip


def float8_layers(models: dict[str, nn.Module]) -> set[str]:
    return {
        f"{part}.{name}"
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, Float8Linear)
    }


LEFT_OUT = {
    "ltx-0.9.0": set(),
    "cogvideox-5b": {"norm1.linear", "norm2.linear"},
    "hunyuan": {"norm1.linear", "norm1_context.linear", "norm.linear"},
    "wan-2.1-i2v": set(),
    "wan-2.2-a14b": set(),
}
"""Linear layers of the blocks that stay as they are, by the ends of their names."""


@pytest.mark.parametrize("row", LEFT_OUT)
def test_exactly_the_expected_layers_compute_in_float8(folders, row, caplog):
    caplog.set_level("INFO")
    method = float8_method(row, folders[row])
    models = load(method)
    within = {
        f"{part}.{name}"
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name and not name.startswith("context_embedder")
    }
    left = {name for name in within if ".".join(name.split(".")[-2:]) in LEFT_OUT[row]}
    assert float8_layers(models) == within - left and len(within) > len(left) >= 2 * len(LEFT_OUT[row])
    said = f"of {len(within)} linear layers of the blocks {len(within - left)} compute in float8 (tensorwise, emulated"
    assert said in caplog.text and f"{len(left)} in bf16" in caplog.text
    _, simulated = meta_models(method)
    assert float8_layers(simulated) == within - left, "on processes that have no weights too"
    assert all(parameter.is_meta for model in simulated.values() for parameter in model.parameters())
    plain = load(float8_method(row, folders[row], None))
    assert not float8_layers(plain)
    for part, model in plain.items():
        ours = models[part].state_dict()
        assert ours.keys() == model.state_dict().keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_a_layer_that_suits_is_refused(folders):
    method = float8_method("ltx-0.9.0", folders["ltx-0.9.0"])
    method.family.precise_layers = "to_|net"
    with pytest.raises(UserError, match=r"^method.float8_recipe tensorwise: no linear layer .*: leave it out$"):
        method.attach(method.build(), seed=0)


def test_saved_weights_have_diffusers_names_and_load(folders, tmp_path):
    from diffusers import LTXVideoTransformer3DModel

    method = float8_method("ltx-0.9.0", folders["ltx-0.9.0"])
    models = load(method)
    method.save(models, gather_weights(SingleEngine(), method, models), tmp_path)
    loaded, report = LTXVideoTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(report.values()) and not float8_layers({"transformer": loaded})
    saved = load_file(next((tmp_path / "transformer").glob("*.safetensors")))
    for name, parameter in models["transformer"].named_parameters():
        assert torch.equal(saved[name], parameter.detach().bfloat16())


def gradients(method: Method, models: dict[str, Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    trained = method.trained(models)
    loss = method.loss(models, batch)
    loss.sum().backward()
    return loss.detach(), {name: each.grad for name, each in trained.items() if each.grad is not None}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The norm of what differs over the norm."""
    assert ours.keys() == theirs.keys()
    squares = [(ours[name].float() - each.float()).square().sum() for name, each in theirs.items()]
    return float((sum(squares) / sum(each.float().square().sum() for each in theirs.values())) ** 0.5)


WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpointing": "full"},
    "every second block": {"checkpointing": "every-2"},
    "attention": {"checkpointing": "attention"},
    "offload": {"checkpointing": "full", "offload_activations": True},
}


CASES = [(row, recipe, kept) for row in ("ltx-0.9.5", "hunyuan") for recipe in RECIPES for kept in ("fp32", "bf16")]
QUICK = {("ltx-0.9.5", "rowwise", "fp32"), ("ltx-0.9.5", "tensorwise", "bf16")}


@pytest.mark.parametrize(
    ("row", "recipe", "weights_dtype"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_what_saves_memory_changes_no_number_and_layers_share_programs(tmp_path, row, recipe, weights_dtype):
    folder = write_deep(row, tmp_path / "model", num_layers=3)
    method = float8_method(row, folder, recipe, weights_dtype=weights_dtype)
    batch = random_batch(method, TINY[row].bucket)
    loss, expected = gradients(method, load(method), batch)
    for way, options in WAYS.items():
        again, found = gradients(method, load(method, **options), batch)
        assert torch.equal(again, loss) and difference(found, expected) == 0, way
    torch.compiler.reset()
    programs: Programs = []
    models = load(method)
    compile_all(method, models, counted(programs))
    again, found = gradients(method, models, batch)
    assert torch.equal(again, loss) and difference(found, expected) == 0
    assert len(programs) <= 1 + kinds_of(method, models), "the input of the first layer may need no gradient"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("row", ["ltx-0.9.5", "hunyuan", "wan-2.1"])
def test_compiled_blocks_are_as_near_as_roundings_of_float8(folders, row, recipe):
    """Where bf16 rounds otherwise a number may become the next one of float8, an eighth away."""
    torch.compiler.reset()
    method = float8_method(row, folders[row], recipe)
    batch = random_batch(method, TINY[row].bucket)
    loss, expected = gradients(method, load(method), batch)
    models = load(method)
    compile_all(method, models, "inductor")
    again, found = gradients(method, models, batch)
    torch.testing.assert_close(again, loss, rtol=2e-3, atol=0)
    assert difference(found, expected) < 0.03


@pytest.mark.parametrize("weights_dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_fifty_steps_learn_what_bf16_learns(folders, weights_dtype):
    """The loss falls to less than a third. None is further from that of bf16 than 3 % of the first, their mean 1 %."""
    curves = {}
    for recipe in (None, *RECIPES):
        options = full(float8_recipe=recipe, weights_dtype=weights_dtype)
        batches = [make_batch(range(start, start + 4)) for start in (0, 4)]
        trainer = make_trainer(folders["ltx-0.9.0"], batches, options=options, dtype=torch.bfloat16)
        stream = trainer.batches.start(0)
        curves[recipe] = torch.stack([trainer.step(stream).loss.detach() for _ in range(50)])
    plain = curves.pop(None)
    assert plain[-2:].mean() < plain[:2].mean() / 3
    for recipe, curve in curves.items():
        assert not torch.equal(curve[0], plain[0])
        worst = (curve - plain).abs().max().item() / plain[0].item()
        mean = abs(curve.mean().item() / plain.mean().item() - 1)
        assert worst < 0.03 and mean < 0.01, (recipe, worst, mean)
    assert not torch.equal(*curves.values())


@pytest.mark.gpu
@pytest.mark.parametrize("weights_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_computes_what_is_emulated(folders, recipe, weights_dtype):
    """Losses and gradients of float8 kernels and of their emulation on the same GPU, then twenty steps of each."""
    if torch.cuda.get_device_capability() < {"tensorwise": (8, 9), "rowwise": (9, 0)}[recipe]:
        pytest.skip("this GPU has no such products")
    curves, answers = [], []
    for emulated in (False, True):
        options = full(float8_recipe=recipe, weights_dtype=weights_dtype)
        batches = [make_batch(range(4)).map(lambda tensor: tensor.cuda())]
        trainer = make_trainer(folders["ltx-0.9.0"], batches, options=options, dtype=torch.bfloat16)
        transformer = trainer.models["transformer"]
        layers = {name: each for name, each in transformer.named_modules() if isinstance(each, Float8Linear)}
        assert len(layers) == 20 and not any(layer.config.emulate for layer in layers.values())
        if emulated:
            compute_in_float8(transformer, list(layers), recipe, emulate=True)
        answers.append(gradients(trainer.method, trainer.models, batches[0]))
        stream = trainer.batches.start(0)
        curves.append(torch.stack([trainer.step(stream).loss.detach() for _ in range(20)]))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=2e-3, atol=0)
    assert difference(answers[0][1], answers[1][1]) < 0.03
    torch.testing.assert_close(curves[0], curves[1], rtol=0.01, atol=0)
