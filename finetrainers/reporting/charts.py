"""Curves as inline SVG, without scripts; colours come from the page's style."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 12, 28
_MOST_POINTS = 800


@dataclass(frozen=True)
class Curve:
    """Points of one curve, and how it is drawn: every value (`faint`), a line through them, or a line with dots."""

    points: Sequence[Point]
    style: Literal["faint", "line", "dots"]


def smoothed(points: Sequence[Point], *, decay: float) -> list[Point]:
    """Running mean over steps in which each new value counts 1 - decay; not drawn towards 0 at the start."""
    total = weight = 0.0
    means = []
    for x, y in points:
        total = decay * total + (1 - decay) * y
        weight = decay * weight + (1 - decay)
        means.append((x, total / weight))
    return means


def running_median(points: Sequence[Point], *, width: int) -> list[Point]:
    """Median of the newest `width` values at each step: what is usual, whatever single values stand out."""
    window: list[float] = []
    medians = []
    for index, (x, y) in enumerate(points):
        insort(window, y)
        if len(window) > width:
            del window[bisect_left(window, points[index - width][1])]
        medians.append((x, window[len(window) // 2]))
    return medians


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure of curves over steps. Its caption has the end of the last curve and the extremes of the first."""
    xs = [x for curve in curves for x, _ in curve.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = _frame([y for curve in curves for _, y in curve.points])

    def place(point: Point) -> Point:
        x = _LEFT + (point[0] - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (min(point[1], y_high) - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = []
    for tick in ticks(y_low, y_high, count=5):
        y = place((x_low, tick))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number_text(tick)}</text>')
    for tick in ticks(x_low, x_high, count=6):
        x = place((tick, y_low))[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{number_text(tick)}</text>')
    for curve in curves:
        parts.extend(_draw(curve, place))
    last, every = curves[-1].points[-1][1], [y for _, y in curves[0].points]
    summary = f"last {number_text(last)} · lowest {number_text(min(every))} · highest {number_text(max(every))}"
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{summary}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
        f"{''.join(parts)}</svg></figure>"
    )


def _draw(curve: Curve, place: Callable[[Point], Point]) -> list[str]:
    points = thinned(curve.points, most=_MOST_POINTS)
    placed = [place(point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline class="{curve.style}" points="{path}"/>']
    if curve.style == "dots" or len(placed) == 1:
        for (x, y), (step, value) in zip(placed, points, strict=True):
            tip = f"<title>step {step:g}: {number_text(value)}</title>"
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    return parts


_ENOUGH = 50
"""Fewer values than this are all shown: among few, a high one is no spike but the start."""


def _frame(values: Sequence[float]) -> tuple[float, float]:
    """The range shown: all values, but for a few that stand so far above the rest that they would flatten it."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) >= _ENOUGH and high - low > 4 * (usual - low) > 0:
        high = low + 2 * (usual - low)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def thinned(points: Sequence[Point], *, most: int) -> list[Point]:
    """At most `most` points that keep every peak: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretch = math.ceil(len(points) / (most // 2))
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """At most about `count` round numbers from `low` to `high`: 1, 2, 2.5 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number_text(value: float) -> str:
    """Four digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
