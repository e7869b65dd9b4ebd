"""The work of a step, counted without weights, against formulas worked out here and against real tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetrainers.families.base import Family
from finetrainers.methods.find import find_method
from finetrainers.planning import count_flop, count_parameters
from finetrainers.types import Bucket, Condition
from tests.families.tiny import TINY
from tests.training.tiny_run import OBJECTIVE, full, lora, make_batch

BUCKET = Bucket(9, 64, 96)
VIDEO, TEXT, WIDTH = 12, 128, 32
"""Tokens of the video and of the text, and the width of the tiny transformer."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {
        name: TINY[name].open(TINY[name].write(tmp_path_factory.mktemp("models") / name))
        for name in ("ltx-0.9.0", "ltx-0.9.5-i2v")
    }


def on_meta(family: Family, options: Any, *, checkpointing: bool = False) -> dict[str, nn.Module]:
    with torch.device("meta"):
        built = family.build_transformers()
        find_method(options, family, OBJECTIVE, dtype=torch.float32).attach(built, seed=0)
    for model in built.values():
        if checkpointing:
            model.enable_gradient_checkpointing()
    return built


def rows_of(layer: str) -> int:
    """How many vectors a linear layer of the transformer is given."""
    if layer.startswith("time_embed."):
        return 1
    is_text = layer.startswith("caption_projection.") or ".attn2.to_k" in layer or ".attn2.to_v" in layer
    return TEXT if is_text else VIDEO


def by_hand(transformer: nn.Module) -> tuple[int, int, int]:
    """Of a forward pass: all, what comes before anything that learns, and what lies in the blocks. A linear layer
    multiplies and adds each number of its matrix once a row, an attention does so twice for each pair of tokens."""
    linear = {
        name: 2 * rows_of(name) * module.in_features * module.out_features
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }
    attention = 2 * sum(2 * 2 * VIDEO * keys * WIDTH for keys in (VIDEO, TEXT))
    firsts = ("proj_in", "caption_projection.linear_1", "time_embed.emb.timestep_embedder.linear_1")
    blocks = sum(flop for name, flop in linear.items() if name.startswith("transformer_blocks.")) + attention
    return sum(linear.values()) + attention, sum(linear[name] for name in firsts), blocks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flop_of_full_fine_tuning_by_hand(models, checkpointing):
    """Backward is twice the forward pass: by the weights and by the inputs, but for what is fed to the first layers.
    Checkpointing computes each block again."""
    built = on_meta(models["ltx-0.9.0"], full(), checkpointing=checkpointing)
    forward, first, blocks = by_hand(built["transformer"])
    counted = count_flop(models["ltx-0.9.0"], built, BUCKET, Condition())
    assert counted == (forward, 3 * forward - first + checkpointing * blocks)


def test_adapters_are_counted(models):
    """Each is rank x columns and rows x rank for every vector."""
    family = models["ltx-0.9.0"]
    base, _ = count_flop(family, on_meta(family, full()), BUCKET, Condition())
    counted, _ = count_flop(family, on_meta(family, lora(rank=4)), BUCKET, Condition())
    targets = [f"transformer_blocks.{block}.attn{n}.to_{p}" for block in (0, 1) for n in (1, 2) for p in "qkvo"]
    assert counted - base == sum(2 * rows_of(name) * 4 * (WIDTH + WIDTH) for name in targets)


def on_cpu(family: Family, options: Any, *, checkpointing: bool) -> tuple[float, float]:
    """The same of a real loss with real weights."""
    method = find_method(options, family, OBJECTIVE, dtype=torch.float32)
    models = method.load(CPU)
    method.attach(models, seed=0)
    models["transformer"].train()
    if checkpointing:
        models["transformer"].enable_gradient_checkpointing()
    text = {name: tensor[None] for name, tensor in family.blank_text().items()}
    batch = replace(make_batch([0]), text=text)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = method.loss(models, batch).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [lora(), lora(target_modules=["to_q"]), full()], ids=["lora", "to_q", "full"])
def test_flop_without_weights_are_those_with_them(models, options, checkpointing):
    family = models["ltx-0.9.0"]
    counted = count_flop(family, on_meta(family, options, checkpointing=checkpointing), BUCKET, Condition())
    assert counted == on_cpu(family, options, checkpointing=checkpointing)


def test_given_frames_may_lengthen_the_sequence(models):
    """A last frame lies before the video as tokens of its own; a first one is among them."""
    family = models["ltx-0.9.5-i2v"]
    built = on_meta(family, lora())
    none, first, both = (
        count_flop(family, built, BUCKET, Condition.parse(text)) for text in ("none", "first", "first_last")
    )
    assert both[0] > none[0] and both[1] > none[1]
    longer = count_flop(family, built, Bucket(17, 64, 96), Condition.parse("first"))
    assert both == longer, "one latent frame more"
    assert first[0] >= none[0], "each token has a timestep of its own"


def test_of_two_experts_one_is_counted(models):
    """A sample is seen by one of them; parameters are counted of both."""
    family = models["ltx-0.9.0"]
    one = on_meta(family, full())
    both = one | {"transformer_2": on_meta(family, full())["transformer"]}
    assert count_flop(family, both, BUCKET, Condition()) == count_flop(family, one, BUCKET, Condition())
    num = sum(parameter.numel() for parameter in both["transformer"].parameters())
    both["transformer_2"].requires_grad_(False)
    assert count_parameters(both) == (2 * num, num)


def test_counting_twice_gives_the_same_and_reads_no_weight(models, monkeypatch):
    family = models["ltx-0.9.0"]
    monkeypatch.setattr(type(family), "load_transformers", lambda *given: pytest.fail("weights were read"))
    built = on_meta(family, lora())
    assert count_flop(family, built, BUCKET, Condition()) == count_flop(family, built, BUCKET, Condition())
    assert all(parameter.is_meta for parameter in built["transformer"].parameters())
