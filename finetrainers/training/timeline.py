"""The memory of a step as it rises and falls from block to block, and what that becomes with more blocks in the middle:
a model of sixty equal blocks is reckoned from one of six."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetrainers.memory.simulation import LiveBytes, Peak

FORWARD, BACKWARD = "forward", "backward"
_ENDS = 4
"""Blocks at both ends of a list that need not do as those in the middle do."""


@dataclass(frozen=True)
class Stretch:
    """A list of blocks: how many there are, how many of them take part in a simulation, and after how many of them
    their measures come again."""

    num_blocks: int
    period: int

    @property
    def kept(self) -> int:
        """As many as end like the whole list, and have two periods in the middle."""
        least = _ENDS + 2 * self.period
        return min(self.num_blocks, least + (self.num_blocks - least) % self.period)

    @property
    def middle(self) -> range:
        """The first of two periods in the middle."""
        first = (self.kept - 2 * self.period) // 2
        return range(first, first + self.period)


@dataclass(frozen=True)
class Segment:
    """From one moment of a step to the next."""

    direction: str
    blocks: str
    """Name of the list of blocks at work; empty outside of them."""
    index: int
    change: int
    """Bytes by which more is held at its end than at its beginning."""
    rise: int
    """Bytes by which most is held more than at its beginning."""


class Timeline:
    """Watches a step of models whose lists of blocks are given with their names; of two experts' one is at work."""

    def __init__(self, lists: Sequence[tuple[str, Sequence[nn.Module]]]) -> None:
        self.segments: list[Segment] = []
        self._lists = lists
        self._live = LiveBytes()
        self._place: tuple[str, str, int] = (FORWARD, "", 0)
        self._begun = 0

    def watch(self, forward: Callable[[], Tensor]) -> None:
        """Run a pass: `forward` gives the loss, whose gradient is computed if it has one."""
        with self._live.counted(), self._marked():
            loss = forward().sum()
            self._move(BACKWARD, "", 0)
            if loss.requires_grad:
                loss.backward()
                del loss
                self._move(BACKWARD, "", 0)

    def _move(self, *place: Any) -> None:
        """One segment ends, and that of another place begins."""
        live = self._live
        self.segments.append(Segment(*self._place, live.now - self._begun, live.peak - self._begun))
        self._place, self._begun = place, live.now
        live.peak = live.now

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Blocks mark where they begin in the forward pass, and where their backward pass ends."""
        hooks = [
            block.register_forward_pre_hook(self._mark(name, index), with_kwargs=True)
            for name, blocks in self._lists
            for index, block in enumerate(blocks)
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _mark(self, name: str, index: int) -> Callable[..., None]:
        def begin(block: nn.Module, args: Any, kwargs: Any) -> None:
            if self._place[0] == BACKWARD:
                return  # Computed again.
            self._move(FORWARD, name, index)
            entering = args[0] if args else kwargs["hidden_states"]
            if entering.requires_grad:
                entering.register_hook(lambda gradient: self._move(BACKWARD, name if index else "", index - 1))

        return begin


def stretched(segments: Sequence[Segment], lists: dict[str, Stretch]) -> Peak | None:
    """What a step holds with all blocks of each list, from the segments of one with those that are `kept`; None where
    blocks in the middle do not do the same."""
    kept = {name: stretch for name, stretch in lists.items() if stretch.kept < stretch.num_blocks}
    if not all(_repeats(segments, name, stretch) for name, stretch in kept.items()):
        return None
    live = peak = after_forward = 0
    for segment in _lengthened(segments, kept):
        peak = max(peak, live + segment.rise)
        live += segment.change
        if segment.direction == FORWARD:
            after_forward = live
    return Peak(peak, after_forward, live)


def _repeats(segments: Sequence[Segment], name: str, stretch: Stretch) -> bool:
    """Whether the two periods in the middle of a list are the same in both directions, and each block runs once."""
    places = Counter((segment.direction, segment.index) for segment in segments if segment.blocks == name)
    if any(count > 1 for count in places.values()):
        return False
    found = {
        (segment.direction, segment.index): (segment.change, segment.rise)
        for segment in segments
        if segment.blocks == name
    }
    return all(
        (direction, index) in found and found[direction, index] == found.get((direction, index + stretch.period))
        for direction in {segment.direction for segment in segments}
        for index in stretch.middle
    )


def _lengthened(segments: Sequence[Segment], lists: dict[str, Stretch]) -> Iterator[Segment]:
    """The segments with those of the middle as often again as blocks are missing."""
    for segment in segments:
        yield segment
        if segment.blocks not in lists:
            continue
        stretch = lists[segment.blocks]
        # The backward pass meets the first of the two periods last.
        end = stretch.middle[-1] if segment.direction == FORWARD else stretch.middle[0]
        if segment.index == end:
            again = [
                each
                for each in segments
                if (each.direction, each.blocks) == (segment.direction, segment.blocks) and each.index in stretch.middle
            ]
            for _ in range((stretch.num_blocks - stretch.kept) // stretch.period):
                yield from again
