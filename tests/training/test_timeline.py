"""What is reckoned of many blocks from few is what all of them give."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetrainers.training import forecast
from finetrainers.training.timeline import BACKWARD, FORWARD, Segment, Stretch, Timeline, stretched
from finetrainers.types import Bucket, Condition
from tests.families.tiny import TINY
from tests.memory.training import FAMILIES, make_method

CASES = [
    ("ltx-0.9.0", "lora", "none", False),
    ("ltx-0.9.0", "full", "every-3", False),
    ("ltx-0.9.0", "full", "feed_forward", True),
    ("cogvideox-5b", "lora", "every-2", True),
    ("cogvideox-5b", "full", "none", False),
    ("hunyuan", "lora", "full", False),
    ("hunyuan", "full", "attention", False),
    ("wan-2.1", "lora", "full", True),
    ("wan-2.1", "full", "every-2", False),
]


@pytest.fixture(scope="module")
def deep(folders, tmp_path_factory):
    """Folders of models of many blocks, of which no weights are read."""
    made = {}
    for row in FAMILIES:
        made[row] = TINY[row].write(tmp_path_factory.mktemp("deep") / row)
        path = made[row] / "transformer" / "config.json"
        config = json.loads(path.read_text())
        depth = dict.fromkeys(("num_layers", "num_single_layers"), 20)
        path.write_text(json.dumps(config | {key: value for key, value in depth.items() if key in config}))
    return made


@pytest.mark.parametrize(("row", "name", "word", "offload"), CASES)
def test_few_blocks_tell_what_all_of_them_hold(deep, row, name, word, offload):
    method = make_method(row, deep[row], name, dtype=torch.bfloat16)
    work = forecast.Work(method, Bucket.parse(TINY[row].bucket), Condition(), 1, None, False)
    memory = SimpleNamespace(base_weights=None, offload_activations=offload)
    run = partial(forecast._segments, work, checkpointing=word, memory=memory, release=False)
    period = int(word.partition("-")[2] or 1)
    # A period more than is simulated, and two of a second kind of blocks.
    lists = {
        blocks: Stretch(4 + (3 + number) * period, period) for number, blocks in enumerate(method.family.block_lists)
    }
    assert all(each.kept < each.num_blocks for each in lists.values())
    whole = run({blocks: each.num_blocks for blocks, each in lists.items()})
    few = run({blocks: each.kept for blocks, each in lists.items()})
    assert len(few) < len(whole)
    reckoned = stretched(few, lists)
    assert reckoned == stretched(whole, {})
    assert reckoned is not None and reckoned != stretched(few, {}) and reckoned.peak >= reckoned.after_forward


@pytest.mark.parametrize(
    ("num_blocks", "period", "kept", "middle"),
    [
        (3, 1, 3, None),
        (6, 1, 6, [2]),
        (7, 1, 6, [2]),
        (60, 1, 6, [2]),
        (28, 2, 8, [2, 3]),
        (29, 2, 9, [2, 3]),
        (40, 3, 10, [2, 3, 4]),
        (41, 3, 11, [2, 3, 4]),
        (42, 3, 12, [3, 4, 5]),
        (30, 100, 30, None),
    ],
)
def test_blocks_that_are_kept(num_blocks, period, kept, middle):
    """Four at the ends and two periods, and what the number of blocks leaves over, so that the last block has the same
    place in its period."""
    stretch = Stretch(num_blocks, period)
    assert stretch.kept == kept
    assert (num_blocks - kept) % period == 0 or kept == num_blocks
    if middle:
        assert list(stretch.middle) == middle


def steps(num_blocks: int, *, forward: int = 10, backward: int = -10, rise: int = 15) -> list[Segment]:
    """A step whose blocks keep `forward` bytes each, let them go again, and need `rise` for a moment."""
    return [
        Segment(FORWARD, "", 0, 3, 4),
        *(Segment(FORWARD, "blocks", index, forward, rise) for index in range(num_blocks)),
        *(Segment(BACKWARD, "blocks", index, backward, rise) for index in reversed(range(num_blocks))),
        Segment(BACKWARD, "", 0, -3, 0),
    ]


def test_by_hand():
    """Forty blocks keep ten bytes each beside the three at the beginning, and the last takes five more for a moment; or
    fifteen at the beginning of its backward pass."""
    lists = {"blocks": Stretch(40, 1)}
    assert lists["blocks"].kept == 6
    peak = stretched(steps(6), lists)
    assert (peak.peak, peak.after_forward, peak.after_backward) == (3 + 400 + 15, 3 + 400, 0)
    assert peak == stretched(steps(40), {})
    left = stretched(steps(6, backward=-8), lists)
    assert left.after_backward == 40 * 2, "gradients"


def test_none_where_the_middle_does_not_repeat():
    segments = steps(6)
    lists = {"blocks": Stretch(40, 1)}
    place = next(n for n, each in enumerate(segments) if (each.direction, each.index) == (BACKWARD, 3))
    other = Segment(BACKWARD, "blocks", 3, -10, 16)
    assert stretched([*segments[:place], other, *segments[place + 1 :]], lists) is None
    twice = [*segments[:3], segments[2], *segments[3:]]
    assert stretched(twice, lists) is None, "a block that runs twice"
    without = [each for each in segments if each.index != 2]
    assert stretched(without, lists) is None
    assert stretched(steps(6), {"blocks": Stretch(6, 1)}) is not None, "nothing is left out"


class Uneven(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(index + 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states).relu()
        return hidden_states


def test_a_model_whose_blocks_differ_is_not_shortened():
    blocks = nn.ModuleList(Uneven(index) for index in range(6))
    timeline = Timeline([("blocks", blocks)])

    def forward() -> torch.Tensor:
        hidden = torch.randn(4, 8)
        for block in blocks:
            hidden = block(hidden_states=hidden)
        return hidden

    timeline.watch(forward)
    assert stretched(timeline.segments, {"blocks": Stretch(9, 1)}) is None
    assert stretched(timeline.segments, {}) is not None
    assert not any(block._forward_pre_hooks for block in blocks), "it leaves no hooks"


def test_where_blocks_differ_all_of_them_are_run(deep, monkeypatch):
    method = make_method("ltx-0.9.0", deep["ltx-0.9.0"], "lora", dtype=torch.bfloat16)
    work = forecast.Work(method, Bucket(9, 64, 96), Condition(), 1, None, False)
    memory = SimpleNamespace(base_weights=None, offload_activations=False)
    asked = []

    def segments(work, most_blocks, **options):
        asked.append(dict(most_blocks))
        uneven = [Segment(FORWARD, "transformer_blocks", index, index, index) for index in range(20)]
        return uneven[: most_blocks.get("transformer_blocks")]

    monkeypatch.setattr(forecast, "_segments", segments)
    step = forecast.simulate_step(work, checkpointing="full", memory=memory, release=False)
    assert asked == [{"transformer_blocks": 6}, {}]
    assert step.height.after_forward == sum(range(20))
