"""Line charts as SVG that stands in the page itself: it takes the page's colours, light or dark, and prints sharply.

Drawn here and not with matplotlib, whose charts keep their colours and take 40 times as long: every run draws a dozen
of them at its end. Long series are thinned to what a screen can show, by the least and the greatest value of each
stretch, so that no spike is lost.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark.report.runs import Series

WIDTH, HEIGHT = 380, 220  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 42  # margins for numbers, and for what they are below
MOST_POINTS = 600  # of a line
FEW_POINTS = 25  # up to which points are marked, and show their value under the pointer
SMOOTH_FROM = 80  # points from which on a running mean is drawn over the values


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        label: for the legend.
        series: what it shows.
        color: number of its colour in the page's style, 0 to 7.
    """

    label: str
    series: Series
    color: int = 0


@dataclass(frozen=True)
class Drawing:
    """What the template makes an SVG of; all coordinates are in its units.

    Args:
        x_ticks: (x, text).
        y_ticks: (y, text).
        paths: (points of the polyline, number of the colour, class: "raw", "mean" or "line").
        dots: (x, y, number of the colour, text under the pointer).
    """

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, int, str]]
    dots: list[tuple[float, float, int, str]]


def draw(lines: Sequence[Line], steps: int) -> Drawing:
    """Lay lines (at least one, none of them empty) out over optimizer steps, from 0 to `steps` or their last one.

    The axis of values is logarithmic where one number would otherwise hide all others: all positive, the greatest more
    than 50 times the median.
    """
    last = max(steps, 1, *(float(line.series.steps[-1]) for line in lines))
    values = np.concatenate([line.series.values for line in lines])
    logarithmic = bool(values.min() > 0 and values.max() > 50 * np.median(values))
    transform = np.log10 if logarithmic else np.asarray
    y_low, y_high = _limits(float(transform(values.min())), float(transform(values.max())), 0.04)

    def x_of(step: np.ndarray | float) -> np.ndarray:
        return LEFT + np.asarray(step) / last * (WIDTH - LEFT - RIGHT)

    def y_of(value: np.ndarray | float) -> np.ndarray:
        return TOP + (y_high - transform(value)) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def points(series: Series) -> str:
        pairs = zip(x_of(series.steps), y_of(series.values), strict=True)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)

    drawing = Drawing([], [], [], [])
    for line in lines:
        count = len(line.series.steps)
        smooth = count >= SMOOTH_FROM
        drawing.paths.append((points(thinned(line.series)), line.color, "raw" if smooth else "line"))
        if smooth:
            drawing.paths.append((points(running_mean(line.series)), line.color, "mean"))
        if count <= FEW_POINTS:
            for step, value in zip(line.series.steps, line.series.values, strict=True):
                text = f"{line.label}, step {step:.0f}: {number(float(value))}"
                x, y = round(float(x_of(step)), 1), round(float(y_of(value)), 1)
                drawing.dots.append((x, y, line.color, text))
    drawing.x_ticks.extend(
        (round(float(x_of(t)), 1), number(t)) for t in ticks(0.0, last, 5) if t == round(t)
    )
    marks = ticks(y_low, y_high, 5)
    if logarithmic:
        whole = [t for t in marks if t == round(t)]
        marks = [10.0**t for t in (whole if len(whole) > 1 else marks)]
    small = 0 < max(abs(t) for t in marks) < 1e-2  # then all with an exponent
    drawing.y_ticks.extend((round(float(y_of(t)), 1), number(t, 1e-2 if small else 0.0)) for t in marks)
    return drawing


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most about `most` points: the least and the greatest value of each of `most / 2` stretches, and both ends."""
    count = len(series.steps)
    if count <= most:
        return series
    edges = np.linspace(0, count, most // 2 + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in itertools.pairwise(edges):
        stretch = series.values[start:stop]
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def running_mean(series: Series) -> Series:
    """Mean over a fortieth of the points around each, at no more points than a screen shows."""
    count = len(series.values)
    half = max(count // 80, 1)
    sums = np.concatenate(([0.0], np.cumsum(series.values)))
    at = np.linspace(0, count - 1, min(count, MOST_POINTS // 3)).astype(int)
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, count)
    return Series(series.steps[at], (sums[last] - sums[first]) / (last - first))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about `about` of them: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def number(value: float, least: float = 1e-3) -> str:
    """A number as people read it: four digits, thousands with their separator, under `least` with an exponent."""
    if value == 0:
        return "0"
    if abs(value) < least or abs(value) >= 1e7:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _limits(low: float, high: float, margin: float) -> tuple[float, float]:
    """Ends of an axis, which never coincide, with some room beyond the values."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.5 * abs(high) or 1.0
        return low - room, high + room
    room = margin * (high - low)
    return low - room, high + room
