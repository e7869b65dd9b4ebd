"""At which noise levels held-out clips are measured, and which of a clip's frames a sample video is given."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetrainers.data.clip import read_clip
from finetrainers.data.index import FileIndex
from finetrainers.data.scan import scan
from finetrainers.data.source import read_source
from finetrainers.demo.clips import render_clips
from finetrainers.engines.single import SingleEngine
from finetrainers.training.validation import HeldOutLoss, given_images
from finetrainers.types import Bucket, Condition


@pytest.mark.parametrize("noise_range", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875)])
@pytest.mark.parametrize("num_levels", [1, 4, 7])
def test_levels_lie_in_the_middle_of_equal_shares_of_the_trained_range(noise_range, num_levels):
    low, high = noise_range
    levels = HeldOutLoss(SimpleNamespace(samples=[]), num_levels, noise_range).levels
    edges = [low + (high - low) * number / num_levels for number in range(num_levels + 1)]
    assert levels == pytest.approx([(a + b) / 2 for a, b in pairwise(edges)])


def test_each_clip_is_measured_at_each_level_alone():
    """The mean over clips and levels, for which the model sees a batch of one at a time."""
    seen = []

    def loss(batch: tuple[int, float]) -> torch.Tensor:
        seen.append(batch)
        return torch.tensor([10.0 * batch[0] + batch[1]])

    drawer = SimpleNamespace(samples=["a", "b", "c"], fixed=lambda index, level: (index, level))
    held_out = HeldOutLoss(drawer, 2, (0.5, 1.0))
    measured = held_out.measure(SimpleNamespace(loss=loss, engine=SingleEngine()))
    assert seen == [(index, level) for index in range(3) for level in (0.625, 0.875)]
    assert measured == pytest.approx(10.0 + 0.75)


GIVEN = {
    "first": ([0], False),
    "first_last": ([0], True),
    "prefix-5": ([0, 1, 2, 3, 4], False),
    "prefix-9": (list(range(9)), False),
}


@pytest.mark.parametrize("condition", GIVEN)
def test_the_frames_of_a_clip_that_are_given(tmp_path: Path, condition):
    """One image, or a list of them; a last one beside it; at the clip's bucket."""
    first, has_last = GIVEN[condition]
    folder = render_clips(tmp_path / "clips", 1, num_frames=12, height=64, width=96, fps=16.0).parent
    items, _ = scan(
        read_source(folder), FileIndex(tmp_path / "i.json"), buckets=[Bucket(9, 32, 64)], fps=None, window="first"
    )
    frames = read_clip(items[0].record, items[0].media, items[0].window, items[0].bucket).video_FCHW
    frames = frames.permute(0, 2, 3, 1).numpy()
    images = given_images(items[0], Condition.parse(condition))
    assert images.keys() == {"image"} | ({"last_image"} if has_last else set())
    given = images["image"] if isinstance(images["image"], list) else [images["image"]]
    assert isinstance(images["image"], list) == (len(first) > 1)
    assert all(np.array_equal(image, frames[index]) for image, index in zip(given, first, strict=True))
    assert not has_last or np.array_equal(images["last_image"], frames[-1])
    assert given_images(items[0], Condition()) == {} and given_images(None, Condition(1)) == {}
