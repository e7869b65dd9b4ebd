"""Every way to compute activations again, and to keep them on the host, against the plain run: to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetrainers.errors import UserError
from finetrainers.memory import offload
from finetrainers.training.measures import save_activations
from tests.families.tiny import TINY
from tests.memory.training import (
    FAMILIES,
    METHODS,
    WORDS,
    Trained,
    load,
    make_method,
    random_batch,
    train,
    write_deeper,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of more blocks than two, so that there is a first one, a last one and others."""
    return {row: write_deeper(row, tmp_path_factory.mktemp("deeper") / row) for row in FAMILIES}


def trained(folders, row, name, word, *, offloaded=False, dtype=torch.float32):
    method = make_method(row, folders[row], name, dtype=dtype)
    sizes = (TINY[row].bucket, TINY[row].other_bucket, TINY[row].bucket)
    models = load(method, word, offload=offloaded)
    return train(method, models, [random_batch(method, size) for size in sizes])


@pytest.fixture(scope="module")
def plain(folders):
    """The run without any of it, once for each family, method and type."""
    made: dict[tuple, Trained] = {}

    def run(row, name, dtype=torch.float32):
        if (row, name, dtype) not in made:
            made[row, name, dtype] = trained(folders, row, name, "none", dtype=dtype)
        return made[row, name, dtype]

    return run


@pytest.fixture
def all_sizes(monkeypatch):
    """Tensors of tiny models are sent too."""
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.mark.parametrize("word", [word for word in WORDS if word != "none"])
@pytest.mark.parametrize("row", FAMILIES)
def test_no_number_changes(row, word, folders, plain):
    """With dropout too, which is drawn again as it was."""
    trained(folders, row, "lora", word).assert_equals(plain(row, "lora"))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("row", FAMILIES)
def test_no_number_changes_with_activations_on_the_host(row, name, word, folders, plain, all_sizes):
    trained(folders, row, name, word, offloaded=True).assert_equals(plain(row, name))


def calls_of(modules) -> list[int]:
    """How often each module runs, in a list that goes on counting."""
    counts = [0] * len(modules)

    def count(index: int) -> None:
        counts[index] += 1

    for index, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, index=index: count(index))
    return counts


# Runs of each block, of an attention's first product and of a feed-forward's, for a step; HunyuanVideo's last three
# blocks have both side by side.
RUNS = {
    "none": ([1] * 5, 1, 1),
    "full": ([2] * 5, 2, 2),
    "every-2": ([2, 1, 2, 1, 2], None, None),
    "every-4": ([2, 1, 1, 1, 2], None, None),
    "attention": ([1] * 5, 2, 1),
    "feed_forward": ([1] * 5, 1, 2),
}


@pytest.mark.parametrize("word", RUNS)
def test_what_is_computed_again(word, folders):
    method = make_method("ltx-0.9.0", folders["ltx-0.9.0"], "full")
    models = load(method, word)
    blocks = models["transformer"].transformer_blocks
    of_blocks = calls_of(blocks)
    attention, feed_forward = calls_of([blocks[1].attn1.to_q]), calls_of([blocks[1].ff.net[0]])
    train(method, models, [random_batch(method, TINY["ltx-0.9.0"].bucket)])
    expected, *layers = RUNS[word]
    assert of_blocks == expected
    assert layers == [None, None] or [*attention, *feed_forward] == layers


@pytest.mark.parametrize(("word", "attention", "feed_forward"), [("attention", 2, 1), ("feed_forward", 2, 2)])
def test_a_block_with_both_side_by_side_is_computed_again_for_its_feed_forward(word, attention, feed_forward, folders):
    method = make_method("hunyuan", folders["hunyuan"], "lora")
    models = load(method, word)
    block = models["transformer"].single_transformer_blocks[0]
    counts = calls_of([block.attn.to_q, block.proj_mlp])
    train(method, models, [random_batch(method, TINY["hunyuan"].bucket)])
    assert counts == [attention, feed_forward]


def test_it_may_be_said_anew(folders):
    """What was said before is taken back, and weights keep their names."""
    method = make_method("ltx-0.9.0", folders["ltx-0.9.0"], "lora")
    models = load(method, "none")
    names = list(models["transformer"].state_dict())
    block = models["transformer"].transformer_blocks[1]
    counts = calls_of([block, block.attn1.to_q, block.ff.net[0]])
    for word, expected in (
        ("attention", [1, 2, 1]),
        ("full", [2, 2, 2]),
        ("feed_forward", [1, 1, 2]),
        ("none", [1] * 3),
    ):
        save_activations(method, models, checkpointing=word, offload=False)
        counts[:] = [0, 0, 0]
        train(method, models, [random_batch(method, TINY["ltx-0.9.0"].bucket)])
        assert counts == expected, word
        assert list(models["transformer"].state_dict()) == names


def test_layers_that_a_family_does_not_name_are_refused(folders):
    method = make_method("ltx-0.9.0", folders["ltx-0.9.0"], "lora")
    method.family.feed_forward_layers = lambda block: []
    with pytest.raises(UserError, match=r"training.gradient_checkpointing feed_forward: .* take full, every-2 or none"):
        load(method, "feed_forward")


@pytest.mark.parametrize("offloaded", [False, True])
def test_two_passes_add_up_as_they_did(offloaded, folders, all_sizes):
    method = make_method("wan-2.1", folders["wan-2.1"], "lora")
    batches = [random_batch(method, size) for size in (TINY["wan-2.1"].bucket, TINY["wan-2.1"].other_bucket)]
    plain = train(method, load(method, "none"), batches, passes=2)
    train(method, load(method, "every-2", offload=offloaded), batches, passes=2).assert_equals(plain)


@pytest.mark.parametrize("word", ["attention", "full"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("row", FAMILIES)
def test_no_number_changes_in_bf16(row, name, word, folders, plain, all_sizes):
    trained(folders, row, name, word, offloaded=True, dtype=torch.bfloat16).assert_equals(
        plain(row, name, torch.bfloat16)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("row", FAMILIES)
def test_no_number_changes_on_a_gpu(row, word, folders, all_sizes):
    """Attention by the kernel that adds in the same order each time."""
    with sdpa_kernel(SDPBackend.MATH):
        plain = trained(folders, row, "lora", "none")
        trained(folders, row, "lora", word, offloaded=True).assert_equals(plain)
