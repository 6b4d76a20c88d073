"""Figures of depth: one colour scale in metres on a page, a colour bar with numbers, holes in a colour of their own.

Drawn with matplotlib's object interface on the Agg canvas: no pyplot, so no global state, no display, and safe in
threads. Near is red, far is blue (matplotlib's `turbo_r`, which separates more depths than perceptually even maps);
grey is no reading.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from finetune.scoring.pictures import Triptych
from spark.errors import UserError
from spark.files import write_whole

HOLE_COLOUR = (0.75, 0.75, 0.75)
"""RGB of pixels without a reading: a grey, which the colour map does not contain."""

INK = "#22272b"
ERROR_LIMIT = 0.5
"""Relative error at the ends of the colours of an error map."""


def depth_colours() -> Colormap:
    """Return the colour map of depth; masked entries take `HOLE_COLOUR`."""
    return matplotlib.colormaps["turbo_r"].with_extremes(bad=HOLE_COLOUR)


def error_colours() -> Colormap:
    """Return the colour map of relative errors: red is too near, blue too far, as in `depth_colours`."""
    return matplotlib.colormaps["RdBu"].with_extremes(bad=HOLE_COLOUR)


def relative_error(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return (prediction - truth) / truth at the size of the truth [h, w], NaN where there is no reading.

    The absolute value averaged over the pixels that count is AbsRel.
    """
    if prediction.shape != truth.shape:
        prediction = cv2.resize(prediction, (truth.shape[1], truth.shape[0]), interpolation=cv2.INTER_LINEAR)
    measured = _has_reading(truth)
    return np.where(measured, prediction / np.where(measured, truth, 1) - 1, np.nan)


def shared_range(depths: Sequence[np.ndarray], floor: float = 0.0) -> tuple[float, float]:
    """Return a colour range (near, far) [m] for these maps together: `floor` to their 99th percentile, rounded up.

    Computed from ground truth, it does not depend on the prediction, so figures of one run can be compared. Rounded
    up to whole metres (half metres below 3 m). With no reading at all it is (floor, floor + 1).
    """
    readings = np.concatenate([depth[_has_reading(depth)].ravel() for depth in depths] or [np.empty(0)])
    if readings.size == 0:
        return floor, floor + 1.0
    far = float(np.percentile(readings, 99))
    step = 0.5 if far < 3 else 1.0
    return floor, max(floor + step, step * math.ceil(far / step))


def colourise(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Return depth [h, w] [m] as uint8 [h, w, 3]: `near` and nearer red, `far` and farther blue, no reading grey."""
    masked = np.ma.masked_where(~_has_reading(depth), depth)
    return depth_colours()(Normalize(near, far, clip=True)(masked), bytes=True)[..., :3]


def colour_range(depth: np.ndarray) -> tuple[float, float]:
    """Ends of the colours [m]: the first and the 99th percentile, and 0.1 m apart at least."""
    near, far = (float(value) for value in np.percentile(depth, [1, 99]))
    return near, max(far, near + 0.1)


def triptychs(
    rows: Sequence[Triptych], title: str = "", near_far: tuple[float, float] | None = None
) -> Figure:
    """Draw input, ground truth, prediction and its relative error, a row for each image.

    All depths are on one colour scale in metres, all errors on one from -50 % (too near) to 50 %.

    Args:
        rows: What to draw, at least one.
        title: Heading of the page.
        near_far: Colour range [m]; `shared_range` of the ground truths when not given.
    """
    if not rows:
        raise UserError("there is nothing to draw: give at least one triptych.")
    near, far = near_far or shared_range([row.truth for row in rows])
    height, width = rows[0].image.shape[:2]
    panel, gap, label = 2.7, 0.08, 0.24  # inches: width of a picture, space between two, line above a row
    picture = panel * height / width
    left, right, bottom, top = 0.12, 1.9, 0.14, 0.30 + (0.30 if title else 0.0)
    page = Page(left + 4 * panel + 3 * gap + right, top + len(rows) * (label + picture) + bottom, dpi=130)
    if title:
        page.text(left, 0.12, title, fontsize=11, weight="bold")
    for column, heading in enumerate(("input", "ground truth", "prediction", "relative error")):
        page.text(left + column * (panel + gap), top - 0.18, heading, fontsize=9.5, weight="bold")
    drawn: Any = None
    wrong: Any = None
    for number, row in enumerate(rows):
        y = top + number * (label + picture) + label
        page.text(left, y - 0.16, shortened(row.name, 2 * panel + gap, fontsize=8), fontsize=8)
        page.text(left + 2 * (panel + gap), y - 0.16, row.caption, fontsize=8)
        page.axes(left, y, panel, picture).imshow(row.image, aspect="auto", interpolation="antialiased")
        for column, depth in ((1, row.truth), (2, row.prediction)):
            axes = page.axes(left + column * (panel + gap), y, panel, picture)
            drawn = _draw_depth(axes, depth, near, far)
        axes = page.axes(left + 3 * (panel + gap), y, panel, picture)
        error = np.ma.masked_invalid(relative_error(row.truth, row.prediction))
        scale = Normalize(-ERROR_LIMIT, ERROR_LIMIT)
        wrong = axes.imshow(error, cmap=error_colours(), norm=scale, aspect="auto", interpolation="nearest")
    bar_left, bar_top = left + 4 * panel + 3 * gap + 0.16, top + label
    bar_bottom = page.height - bottom - 0.30
    _colour_bar(page.figure, page.axes(bar_left, bar_top, 0.17, bar_bottom - bar_top), drawn)
    errors = page.axes(bar_left + 0.85, bar_top, 0.17, bar_bottom - bar_top)
    errors.set_axis_on()
    page.figure.colorbar(wrong, cax=errors, extend="both", format=PercentFormatter(1, 0))
    errors.tick_params(labelsize=8, colors=INK, width=0.6, length=3)
    errors.set_ylabel("too near  ←  relative error  →  too far", fontsize=8.5, color=INK)
    swatch = page.axes(bar_left, page.height - bottom - 0.17, 0.17, 0.17)
    swatch.imshow([[HOLE_COLOUR]], aspect="auto")
    page.text(bar_left + 0.25, page.height - bottom - 0.15, "no reading", fontsize=8)
    return page.figure


def depth_map(depth: np.ndarray, near: float, far: float, title: str = "") -> Figure:
    """Draw one depth map [h, w] [m] with a colour bar from `near` to `far` metres.

    Pixel for pixel if its long side is between 400 and 1600 pixels; a smaller map is enlarged by a whole number, its
    pixels as squares, and a larger one reduced. A title too long for the page loses its middle.
    """
    longest = max(depth.shape)
    per_inch = 100 * longest / 1600 if longest > 1600 else 100 / math.ceil(400 / longest)
    height, width = (max(side / per_inch, 0.1) for side in depth.shape)  # a map of one row is to be seen too
    left, top, bar_height = 0.12, 0.36 if title else 0.12, max(height, 1.2)
    page = Page(left + max(width, 1.5) + 0.95, top + bar_height + 0.12, dpi=100)
    page.text(left, 0.13, shortened(title, page.width - 2 * left, fontsize=9), fontsize=9)
    drawn = _draw_depth(page.axes(left, top, width, height), depth, near, far)
    _colour_bar(page.figure, page.axes(left + width + 0.14, top, 0.17, bar_height), drawn)
    return page.figure


def shortened(text: str, width: float, fontsize: float) -> str:
    """Text that fits `width` [inches] in letters of average width; the middle gives way, as names differ at the end."""
    most = max(8, int(width / (0.6 * fontsize / 72)))
    if len(text) <= most:
        return text
    start = most // 3
    return f"{text[:start]}…{text[len(text) - (most - start - 1) :]}"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; the folder is made where missing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_whole(path, buffer.getvalue())


class Page:
    """A white figure addressed in inches from its top left corner: text and pictures keep their sizes on any page."""

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Return frameless axes of this size with the top left corner at (x, y)."""
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )
        axes.set_axis_off()
        return axes

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text with the top left corner at (x, y)."""
        self.figure.text(x / self.width, 1 - y / self.height, text, va="top", color=INK, **style)


def _draw_depth(axes: Axes, depth: np.ndarray, near: float, far: float) -> AxesImage:
    masked = np.ma.masked_where(~_has_reading(depth), depth)
    return axes.imshow(
        masked, cmap=depth_colours(), vmin=near, vmax=far, aspect="auto", interpolation="nearest"
    )


def _colour_bar(figure: Figure, axes: Axes, drawn: AxesImage) -> None:
    axes.set_axis_on()
    # The pointed ends say that what lies beyond has the end's colour; nothing is nearer than 0.
    bar = figure.colorbar(drawn, cax=axes, extend="both" if drawn.norm.vmin else "max")
    axes.invert_yaxis()  # near on top
    axes.tick_params(labelsize=8, colors=INK, width=0.6, length=3)
    bar.outline.set_linewidth(0.6)  # type: ignore[operator]
    bar.set_label("depth [m]", fontsize=8.5, color=INK)


def _has_reading(depth: np.ndarray) -> np.ndarray:
    return np.isfinite(depth) & (depth > 0)
