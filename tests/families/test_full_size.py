"""The published architectures on the meta device: what `plan` says of their tokens and their work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.published import PUBLISHED
from finetrainers.planning import count_flop
from finetrainers.types import Bucket, Condition
from tests.families.tiny import TINY

# A size, its tokens (counted by hand: latent frames x height x width over the patch), and the operations of its layers.
MODELS = {
    "LTX-Video 2B": ("49x512x768", 7 * 16 * 24, "cross"),
    "HunyuanVideo 13B": ("49x544x960", 13 * 34 * 60, "streams"),
    "CogVideoX-5b": ("49x480x720", 13 * 30 * 45, "joint"),
    "CogVideoX1.5-5B": ("81x768x1360", 11 * 48 * 85, "joint"),
    "Wan 2.1 1.3B": ("81x480x832", 21 * 30 * 52, "cross"),
}


def work_of_blocks(config: Any, kind: str, *, video: int, text: int) -> float:
    """Operations of the blocks of one forward pass: 2 a multiplication and addition, in products of matrices alone."""
    width = config.num_attention_heads * config.attention_head_dim
    hidden = getattr(config, "ffn_dim", 4 * width)
    linear = 2 * width * width
    if kind == "cross":
        # Self-attention over the video, cross-attention to the text, feed-forward.
        products = linear * (4 * video + 2 * video + 2 * text) + 4 * width * hidden * video
        return config.num_layers * (products + 4 * video * video * width + 4 * video * text * width)
    both = video + text
    attention = 4 * both * both * width
    block = linear * 4 * both + 4 * width * hidden * both + attention
    if kind == "joint":
        return config.num_layers * block
    # HunyuanVideo: two streams side by side, then one whose attention and feed-forward share their last product.
    single = linear * 3 * both + 2 * width * 4 * width * both + 2 * 5 * width * width * both + attention
    return config.num_layers * block + config.num_single_layers * single


@pytest.mark.parametrize("name", MODELS)
def test_plan_knows_tokens_and_work(name, tmp_path):
    """All but a few parts in a hundred lie in the blocks; embeddings, modulation and projections are the rest."""
    size, tokens, kind = MODELS[name]
    family = TINY[PUBLISHED[name].row].open(PUBLISHED[name].write(tmp_path / "model"))
    bucket = Bucket.parse(size)
    assert family.num_tokens(bucket) == tokens
    with torch.device("meta"):
        models = family.build_transformers()
    config = models["transformer"].config
    text_BLD = family.blank_text()["prompt_embeds"]
    forward, training = count_flop(family, models, bucket, Condition())
    expected = work_of_blocks(config, kind, video=tokens, text=text_BLD.shape[0])
    assert expected < forward < 1.03 * expected
    assert training == pytest.approx(3 * forward, rel=1e-3), "a backward pass is two forward passes"
