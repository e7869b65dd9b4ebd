"""Which weights move, in which type they are kept, and in which they compute."""

import pytest
import torch

from finetrainers.errors import UserError
from finetrainers.families.find import find_family
from finetrainers.methods.find import find_method
from tests.families.tiny import TINY
from tests.training.tiny_run import OBJECTIVE, full, lora, make_batch


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = TINY["ltx-0.9.0"].write(tmp_path_factory.mktemp("model"))
    return find_family(str(folder), revision=None, task="text-to-video")


def attached(family, options, dtype):
    method = find_method(options, family, OBJECTIVE, dtype=dtype)
    transformer = family.load_transformer(method.weights_dtype)
    return method, transformer, method.attach(transformer, seed=1)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_moves_adapters_alone_and_keeps_them_in_fp32(family, dtype):
    method, transformer, trained = attached(family, lora(), dtype)
    assert len(trained) == 2 * 2 * 4 * 2, "two blocks, two attentions, four projections, A and B"
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for name, p in transformer.named_parameters() if name not in trained} == {dtype}
    assert not any(p.requires_grad for name, p in transformer.named_parameters() if name not in trained)
    method.loss(transformer, make_batch([0, 1])).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_moves_everything_in_fp32(family, dtype):
    method, transformer, trained = attached(family, full(), dtype)
    assert trained.keys() == dict(transformer.named_parameters()).keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    loss = method.loss(transformer, make_batch([0, 1]))
    assert loss.shape == (2,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert all(p.grad is not None for p in trained.values())


def test_adapters_compute_in_the_type_of_the_activations(family):
    """fp32 adapters on a bf16 base must not turn the activations kept for the backward pass into fp32."""
    _, transformer, _ = attached(family, lora(), torch.bfloat16)
    seen = set()
    for name, module in transformer.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda _, given, answer: seen.add((given[0].dtype, answer.dtype)))
    text = make_batch([0]).text
    family.predict(transformer, torch.randn(1, 8, 2, 2, 3), torch.tensor([500.0]), text=text, fps=[25.0])
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_fp32_adapters_keep_no_more_activations_than_bf16_ones(family):
    """Bytes kept for the backward pass, counted; peft's own way with fp32 adapters keeps clearly more."""

    def kept(make_like_peft):
        from peft import LoraConfig

        if make_like_peft:
            method = find_method(lora(rank=4), family, OBJECTIVE, dtype=torch.bfloat16)
            transformer = family.load_transformer(torch.bfloat16).requires_grad_(False)
            config = LoraConfig(r=4, lora_alpha=4, target_modules=r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)")
            transformer.add_adapter(config)
            for parameter in transformer.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        else:
            method, transformer, _ = attached(family, lora(rank=4), torch.bfloat16)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method.loss(transformer, make_batch(range(8))).sum()
        own = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
        del loss
        return sum(size for pointer, size in storages.items() if pointer not in own)

    assert kept(False) < 0.9 * kept(True)


def test_the_scale_is_alpha_over_rank_and_defaults_to_one(family):
    for alpha, scale in [(None, 1.0), (8, 2.0), (1, 0.25)]:
        _, transformer, _ = attached(family, lora(rank=4, alpha=alpha), torch.float32)
        scales = {s for m in transformer.modules() if hasattr(m, "scaling") for s in m.scaling.values()}
        assert scales == {scale}


def test_the_seed_fixes_the_adapters_and_nothing_else_is_drawn(family):
    first = attached(family, lora(), torch.float32)[2]
    method = find_method(lora(), family, OBJECTIVE, dtype=torch.float32)
    transformer = family.load_transformer(torch.float32)
    state = torch.get_rng_state()
    second = method.attach(transformer, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(p.abs().max() > 0 for name, p in first.items() if "lora_A" in name)
    assert all(p.abs().max() == 0 for name, p in first.items() if "lora_B" in name), "starts as the base model"


TARGETS = [
    (["to_q"], 4),
    (["attn1.to_q", "ff.net.2"], 4),
    (r"transformer_blocks\.0\..*to_k", 2),
    ("proj_out", 1),
]


@pytest.mark.parametrize(("targets", "count"), TARGETS)
def test_targets_by_name_or_by_expression(family, targets, count):
    _, _, trained = attached(family, lora(target_modules=targets), torch.float32)
    assert len(trained) == 2 * count


@pytest.mark.parametrize(("targets", "said"), [(["q_proj"], "matches no linear layer"), ("(", "regular expression")])
def test_targets_that_match_nothing_are_refused(family, targets, said):
    with pytest.raises(UserError, match=said):
        attached(family, lora(target_modules=targets), torch.float32)
