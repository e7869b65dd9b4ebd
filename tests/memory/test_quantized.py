"""Frozen weights in low precision: how far from the weights, exact beyond that, and nothing held that is not said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError
from finetrainers.memory import quantized
from finetrainers.memory.quantized import (
    QuantizedLinear,
    choose_formats,
    dequantize,
    quantize,
    quantize_layers,
    quantized_bytes,
)
from finetrainers.planning import count_flop
from finetrainers.training.measures import lower_precision
from finetrainers.types import Bucket, Condition
from tests.families.tiny import TINY
from tests.memory.low_precision import FORMATS, ROWS, batch_of, load, lora_method, moved, quantized_layers, steps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(96, 80), (48, 17), (256, 384), (1, 1)]
"""Out and in features; rows that end within a block of 64 or 128 weights among them."""


def weights(size: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """As trained ones look: a bell with few that lie far out, and a row and a column of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator) * 0.02
    weight[torch.rand(size, generator=generator) < 1e-3] *= 20
    if min(size) > 1:
        weight[0], weight[:, 0] = 0, 0
    return weight.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_each_weight_is_within_half_a_step_of_its_format(format, size, dtype, device):
    weight = weights(size, dtype, device)
    codes, scale = quantize(weight, format)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert codes.nbytes + scale.nbytes == quantized_bytes(format, *size)
    weight = weight.double()
    error = (dequantize(codes, scale, format, size, torch.float32).double() - weight).abs()
    if format == "fp8":
        # Three bits after the leading one: half of 2^-3. Below 2^-6 the steps are all 2^-9.
        allowed = (weight.abs() * 2**-4).maximum(scale.double() * 2**-10)
    elif format == "int8":
        block = size[1] // scale.shape[1]
        allowed = scale.double().repeat_interleave(block, 1) / 2
    else:
        # The widest gap between the sixteen values is from -1 to -0.6962; the scale itself is bf16.
        largest = scale.double().repeat_interleave(64)[: weight.numel()].view(size)
        allowed = largest * ((1 - 0.6962) / 2 + 2**-8)
    assert (error <= allowed * (1 + 1e-6)).all()
    assert error.isfinite().all() and (error[weight == 0] <= 1e-30).all()


RMS = {"fp8": (2**-4 / math.sqrt(12), 2**-3 / math.sqrt(12)), "int8": (0.004, 0.015), "nf4": (0.08, 0.13)}
"""Relative errors that a layer can have: of fp8 between those of weights at the end and at the beginning of a power of
two; of int8 a step of 1/127 of what is largest among 128, three to five sigma, or more where some lie far out."""


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_of_a_layer_is_that_of_the_table(format):
    weight = weights((1024, 1024), torch.bfloat16, "cpu")
    weight[0], weight[:, 0] = 0.01, 0.01
    error = dequantize(*quantize(weight, format), format, (1024, 1024), torch.float32) - weight.float()
    low, high = RMS[format]
    assert low < (error.norm() / weight.float().norm()).item() < high


def test_dequantizing_fp8_is_exact_in_bf16():
    codes, scale = quantize(weights((96, 80), torch.bfloat16, "cpu"), "fp8")
    one, other = (dequantize(codes, scale, "fp8", (96, 80), dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(one.float(), other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_linear_one_of_its_weights(format, dtype, device, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 96, bias=bias)).requires_grad_(False).to(device, dtype)
    model[0].weight.data = weights((96, 80), dtype, device)
    quantize_layers(model, {"0": format}, device=torch.device(device))
    layer = model[0]
    inputs = [torch.randn(2, 5, 80, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    answers = model(inputs[0]), linear(inputs[1], layer.dequantized(dtype), layer.bias)
    assert torch.equal(*answers) and answers[0].dtype == dtype
    up = torch.randn_like(answers[0])
    for answer in answers:
        answer.backward(up)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert model.to(torch.float64)[0].weight.dtype == torch.int8, "whoever casts a model leaves the codes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradients_are_those_of_the_plain_model_of_its_weights(folders, name, dtype):
    method = lora_method(name, folders[name], dtype)
    batch = batch_of(name, folders[name])
    for format in FORMATS:
        models, trained = load(method, base_weights=format)
        plain, twins = load(method)
        for path, layer in quantized_layers(models).items():
            part, _, within = path.partition(".")
            plain[part].get_submodule(within).weight.data = layer.dequantized(dtype)
        losses = [method.loss(each, moved(batch, models)) for each in (models, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.sum().backward()
        assert trained.keys() == twins.keys()
        for key, parameter in trained.items():
            assert parameter.grad is twins[key].grad is None or torch.equal(parameter.grad, twins[key].grad), key


@pytest.mark.parametrize("name", ROWS)
def test_what_is_held_is_the_blocks_linear_layers_and_the_rest_as_it_was(folders, name):
    method = lora_method(name, folders[name], torch.bfloat16)
    plain, _ = load(method)
    before = {f"{part}.{key}": p for part, model in plain.items() for key, p in model.named_parameters()}
    for format in FORMATS:
        models, trained = load(method, base_weights=format)
        layers = quantized_layers(models)
        for part, model in models.items():
            within = {id(module) for block in method.family.blocks(part, model) for module in block.modules()}
            for path, module in model.named_modules():
                assert not (type(module) is nn.Linear and id(module) in within), path
                if isinstance(module, QuantizedLinear):
                    assert id(module) in within and module.format == ("int8" if "norm" in path else format)
        held = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers.values())
        assert held == sum(
            quantized_bytes(layer.format, layer.out_features, layer.in_features) for layer in layers.values()
        )
        after = {f"{part}.{key}": p for part, model in models.items() for key, p in model.named_parameters()}
        codes = {f"{path}.{tensor}" for path in layers for tensor in ("weight", "scale")}
        assert after.keys() - codes == before.keys() - codes
        for key in after.keys() - codes:
            # Adapters are drawn as they are in a plain run.
            assert torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype, key
        assert set(trained) == {key for key, parameter in after.items() if parameter.requires_grad}
        assert all("lora_" in key for key in trained)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_more_is_kept_for_the_backward_pass(folders, name):
    method = lora_method(name, folders[name])

    def kept(**memory: str) -> int:
        """Bytes that autograd keeps besides what the models hold."""
        models, _ = load(method, **memory)
        held = {tensor.untyped_storage().data_ptr() for model in models.values() for tensor in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method.loss(models, moved(batch_of(name, folders[name]), models))
        assert loss.requires_grad
        return sum(storages.values())

    plain = kept()
    assert [kept(base_weights=format) for format in FORMATS] == [plain] * 3 and plain > 0


@pytest.mark.parametrize("name", ROWS)
def test_losses_stay_within_the_error_of_the_weights(folders, name):
    """Errors of layers that know nothing of each other add up in squares: the answer is off by r, the root of the sum
    of the squares of their relative errors, at most, since a layer's answer goes into a sum with what came before. Then
    a loss |p - t|^2 is off by 2 r |p| / |p - t| + its square at most."""
    method, folder = lora_method(name, folders[name]), folders[name]
    plain = steps(method, name, folder, 5)
    for format in FORMATS:
        run = steps(method, name, folder, 5, base_weights=format)
        squares = []
        for path, layer in quantized_layers(run.models).items():
            part, _, within = path.partition(".")
            weight = plain.models[part].get_submodule(within).weight
            squares.append((layer.dequantized(torch.float32) - weight).norm() ** 2 / weight.norm() ** 2)
        # Of two experts a batch asks one.
        r = math.sqrt(sum(squares) / len(run.models)) * plain.answer
        for loss, exact in zip(run.losses, plain.losses, strict=True):
            assert 1e-7 < abs(loss / exact - 1) < 2 * r + r**2, format
        # Adapters learn from the same: their gradients are linear in the same errors, there and back.
        assert all(abs(one / other - 1) < 4 * r for one, other in zip(run.norms, plain.norms, strict=True)), format


@pytest.mark.parametrize("name", ROWS)
def test_a_model_without_weights_has_the_same_shapes_and_work(folders, name):
    """What is planned, and what processes hold before they get the weights."""
    method = lora_method(name, folders[name])

    def described(format: str | None) -> dict[str, nn.Module]:
        with torch.device("meta"):
            models = method.build()
            method.attach(models, seed=0)
        lower_precision(method, models, format, device=torch.device("meta"))
        return models

    for format in FORMATS:
        for part, model in load(method, base_weights=format)[0].items():
            ours = {key: (p.shape, p.dtype) for key, p in described(format)[part].named_parameters()}
            assert ours == {key: (p.shape, p.dtype) for key, p in model.named_parameters()}, format
    bucket, condition = Bucket.parse(TINY[name].bucket), Condition.parse(TINY[name].conditions[0])
    plain, ours = (count_flop(method.family, described(format), bucket, condition) for format in (None, "nf4"))
    assert ours == plain


def test_fake_tensors_go_through(folders):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for format in FORMATS:
        with FakeTensorMode():
            sizes = ((80, 96), (96, 48))
            model = nn.Sequential(*(nn.Linear(*size, dtype=torch.bfloat16) for size in sizes)).requires_grad_(False)
            quantize_layers(model, {"0": format, "1": format}, device=torch.device("cpu"))
            inputs = torch.randn(2, 5, 80, dtype=torch.bfloat16, requires_grad=True)
            answer = model(inputs)
            answer.sum().backward()
            assert answer.shape == (2, 5, 48) and inputs.grad.shape == (2, 5, 80)
            held = sum(layer.weight.nbytes + layer.scale.nbytes for layer in model)
            assert held == quantized_bytes(format, 96, 80) + quantized_bytes(format, 48, 96)
    # Nothing fake stays behind in a library's tables.
    codes, scale = quantize(weights((96, 80), torch.float32, "cpu"), "nf4")
    assert dequantize(codes, scale, "nf4", (96, 80), torch.float32).isfinite().all()


def test_adapters_can_be_taken_off_and_cannot_be_merged_into_codes(folders):
    method = lora_method("ltx-0.9.5-i2v", folders["ltx-0.9.5-i2v"])
    models, _ = load(method, base_weights="fp8")
    before = quantized_layers(models)
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type Char"):
        models["transformer"].fuse_lora()
    models["transformer"].unload_lora()
    after = quantized_layers(models)
    assert [*after.values()] == [*before.values()] and not any("base_layer" in path for path in after)


def test_a_text_encoder_that_learns_stays_as_it_is(folders):
    method = lora_method("ltx-0.9.0", folders["ltx-0.9.0"], text_encoder="lora")
    models, _ = load(method, base_weights="int8")
    assert {path.partition(".")[0] for path in quantized_layers(models)} == {"transformer"}
    assert {parameter.dtype for parameter in models["text_encoder"].parameters()} == {torch.float32}


def test_only_frozen_plain_linear_layers_within_blocks_are_chosen():
    names = ("frozen", "trained", "bias_trained", "norm", "embedder")
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in names}).requires_grad_(False)
    block["trained"].weight.requires_grad_(True)
    block["bias_trained"].bias.requires_grad_(True)
    block["attention"] = nn.MultiheadAttention(4, 1).requires_grad_(False)
    model = nn.ModuleDict({"outside": nn.Linear(4, 4).requires_grad_(False), "block": block})
    chosen = choose_formats(model, [block], "nf4", precise="embed", sensitive="norm")
    assert chosen == {"block.frozen": "nf4", "block.norm": "int8"}


def test_a_missing_package_is_said_at_once(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"memory\.base_weights nf4 needs bitsandbytes: pip install"):
        quantized.check_format("memory.base_weights", "nf4")
    for format in ("fp8", "int8", None):
        quantized.check_format("memory.base_weights", format)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_only_one_layer_is_whole_on_the_device(format):
    device = SingleEngine().device
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(8)))
    model.requires_grad_(False)
    torch.cuda.reset_peak_memory_stats()
    begun = torch.cuda.memory_allocated()
    quantize_layers(model, {str(number): format for number in range(8)}, device=device)
    # Twice in fp32 besides the weight and its codes.
    assert torch.cuda.max_memory_allocated() - begun < 2048 * 2048 * (2 + 4 * 4)
    assert torch.cuda.memory_allocated() == begun, "and the codes come back"
