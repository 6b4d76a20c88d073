"""Calibration: what a model predicts, brought to the metres of a camera or a place, and how that is fitted.

A calibration is a scale and a shift in one of three spaces. With d the depth that the head gives, x its inverse depth
(of a head without metres), a the scale and b the shift, calibrated depth is

| space | calibrated depth | one factor of depth, f, is |
|---|---|---|
| depth | a d + b | a = f, b = 0 |
| log_depth | exp(a ln d + b) | a = 1, b = ln f |
| disparity | 1 / (a / d + b), or 1 / (a x + b) without metres | a = 1 / f, b = 0 |

kept within [min_depth, max_depth]. It is part of a `DepthModel`, which applies it to `depth` outside of training, so
prediction, evaluation and export have it without knowing of it.

Fits are robust: Theil (1950) and Sen (1968), medians over pairs of points, to begin with, then least squares under
Huber's loss (1964), quadratic for small residuals and linear beyond, so that a wrong tape measure does not turn the
result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from finetune.heads.output import DepthOutput
from finetune.options import Fit, Space
from spark.errors import UserError

SPACES: tuple[Space, ...] = ("depth", "log_depth", "disparity")
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of normally distributed numbers -> their standard deviation."""
LEAST_SPREAD = 1.05
"""Ratio of the largest to the smallest prediction below which no shift can be told from a scale."""
LARGEST_DEPTH = 1e6
"""No calibration reaches farther [m]: such a fit is to other units than metres, or to points that say nothing."""


@dataclass(frozen=True)
class Calibration:
    """Scale and shift of depth in a space, see the table above.

    Args:
        space: in which scale and shift apply.
        scale: a, above 0: what is farther stays farther.
        shift: b.
        min_depth: nearest calibrated depth [m].
        max_depth: farthest calibrated depth [m].
        origin: a sentence on where it comes from.
        errors: mean absolute relative error on what it was fitted to: "before", "after", and "left_out", of each point
            or image under a fit to the others; without units.
    """

    space: Space
    scale: float
    shift: float
    min_depth: float
    max_depth: float
    origin: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise UserError(f"space of a calibration is one of {', '.join(SPACES)}, not {self.space!r}")
        numbers = (self.scale, self.shift, self.min_depth, self.max_depth)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise UserError(f"a calibration holds finite numbers, not {numbers}")
        if self.scale <= 0:
            raise UserError(
                f"scale of a calibration must be above 0, what is farther stays so, not {self.scale}"
            )
        if not 0 < self.min_depth < self.max_depth:
            raise UserError(
                "depths of a calibration must satisfy 0 < min_depth < max_depth, not"
                f" {self.min_depth} and {self.max_depth}"
            )

    def apply(self, output: DepthOutput) -> DepthOutput:
        """Calibrate `depth` [B, 1, H, W] [m] of a model's output; a head without metres has it from then on."""
        limits = self.min_depth, self.max_depth
        if self.space == "disparity":
            inverse = output.disparity_affine if output.depth is None else output.depth.reciprocal()
            assert inverse is not None
            depth = (self.scale * inverse + self.shift).clamp(1 / limits[1], 1 / limits[0]).reciprocal()
        else:
            assert output.depth is not None
            logarithmic = self.space == "log_depth"
            depth = self.scale * (output.depth.log() if logarithmic else output.depth) + self.shift
            depth = depth.exp() if logarithmic else depth
        return replace(output, depth=depth.clamp(*limits))

    def metres(self, predicted: np.ndarray, relative: bool = False) -> np.ndarray:
        """The same for numbers of any shape: depth [m], or inverse depth of a head without metres if `relative`."""
        values = to_space(np.asarray(predicted, np.float64), self.space, relative)
        return from_space(self.scale * values + self.shift, self.space, (self.min_depth, self.max_depth))

    def as_config(self) -> dict[str, Any]:
        """What config.json of a model holds; `Calibration(**it)` is this again."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for people."""
        shift = f" {'-' if self.shift < 0 else '+'} {abs(self.shift):.4g}" if self.shift else ""
        formula = {
            "depth": f"{self.scale:.4g} d{shift}{' m' if shift else ''}",
            "log_depth": f"exp({self.scale:.4g} ln d{shift})",
            "disparity": f"1 / ({self.scale:.4g} / d{shift})",
        }[self.space]
        return f"calibrated, {formula}: {self.origin}"


def to_space(values: np.ndarray, space: Space, relative: bool = False) -> np.ndarray:
    """Depth [m] in a space; inverse depth of a head without metres is there already, and only disparity takes it."""
    if relative:
        if space != "disparity":
            raise UserError(
                f"a head without metres gives inverse depth, which is calibrated in space disparity, not {space}"
            )
        return values
    return {"depth": lambda d: d, "log_depth": np.log, "disparity": np.reciprocal}[space](values)


def from_space(values: np.ndarray, space: Space, limits: tuple[float, float]) -> np.ndarray:
    """The inverse of `to_space`, kept within `limits` [m]: inverse depths of 0 and below are the farthest."""
    if space == "disparity":
        return 1 / values.clip(1 / limits[1], 1 / limits[0])
    return (np.exp(values) if space == "log_depth" else values).clip(*limits)


@dataclass(frozen=True)
class Readings:
    """Known distances, with what the uncalibrated model says there.

    Args:
        predicted: float64 [N], depth [m], or inverse depth of a head without metres.
        metres: float64 [N], the known ones [m].
        group: int [N], the point or image that each belongs to: what is left out together.
        names: of the groups, for reports.
        relative: whether `predicted` is inverse depth up to scale and shift.
    """

    predicted: np.ndarray
    metres: np.ndarray
    group: np.ndarray
    names: Sequence[str]
    relative: bool = False

    def __post_init__(self) -> None:
        if not len(self.predicted) == len(self.metres) == len(self.group) or not len(self.metres):
            raise UserError("there is no known distance to fit to: give points, or pairs with readings")
        for name, number in zip(self.names, self.metres, strict=False):
            if not (math.isfinite(number) and number > 0):
                raise UserError(
                    f"{name} has a distance of {number:g} m: distances are above 0 and finite, correct it"
                )
        if self.metres.max() > LARGEST_DEPTH:
            raise UserError(f"a distance of {self.metres.max():g} m is none of a photo: give metres")
        if not (np.isfinite(self.predicted).all() and (self.relative or self.predicted.min() > 0)):
            raise UserError("the model predicts no finite depth above 0 there: calibrate another model")

    def of(self, chosen: np.ndarray) -> "Readings":
        """The chosen ones, bool [N]."""
        return replace(
            self, predicted=self.predicted[chosen], metres=self.metres[chosen], group=self.group[chosen]
        )


def fit_line(readings: Readings, space: Space, fit: Fit) -> tuple[float, float]:
    """Scale and shift of a space, robustly."""
    from scipy.stats import theilslopes  # seconds to import, for this fit only

    if readings.relative and fit != "scale_shift":
        raise UserError("a head without metres needs scale and shift (fit scale_shift) in space disparity")
    x = to_space(readings.predicted, space, readings.relative)
    y = to_space(readings.metres, space)
    if fit == "scale":
        factor = float(np.median(np.log(readings.metres / readings.predicted)))
        if space == "log_depth":
            return 1.0, _robust(lambda p: x + p[0] - y, [factor], 0.02)[0]
        start = math.exp(factor if space == "depth" else -factor)
        return _robust(lambda p: p[0] * x - y, [start], 0.02 * float(np.median(y)))[0], 0.0
    _check_spread(readings)
    few = np.unique(np.linspace(0, len(x) - 1, min(len(x), 400)).astype(int))
    start = np.asarray(theilslopes(y[few], x[few], method="joint")[:2], np.float64).tolist()
    unit = 0.02 if space == "log_depth" else 0.02 * float(np.median(y))
    scale, shift = _robust(lambda p: p[0] * x + p[1] - y, start, unit)
    if scale <= 0:
        raise UserError(
            "what the model takes for farther was measured nearer, no scale above 0 fits: check the order of the"
            " coordinates (x, y, metres) and the distances, or fit the scale only"
        )
    return scale, shift


def _check_spread(readings: Readings) -> None:
    groups = len(np.unique(readings.group))
    low, high = float(readings.predicted.min()), float(readings.predicted.max())
    if len(readings.metres) < 2:
        raise UserError(
            f"scale and shift need two known distances at least, better five, here is {groups}: add some, or fit"
            " the scale only (fit scale)"
        )
    if high - low <= (LEAST_SPREAD - 1) * (min(abs(low), abs(high)) if low * high > 0 else 0.0):
        raise UserError(
            f"the model sees all known distances at about the same place ({low:.3g} to {high:.3g}), so a shift cannot"
            " be told from a scale: add nearer or farther ones, or fit the scale only (fit scale)"
        )


def _robust(residual: Any, start: list[float], least: float) -> list[float]:
    """Least squares under Huber's loss, quadratic up to 1.345 robust deviations of the residuals at the start, which
    costs 5 % of the precision where errors are normal after all (Huber 1964)."""
    from scipy.optimize import least_squares  # a second to import, for this fit only

    first = residual(start)
    deviation = MAD_TO_SIGMA * float(np.median(np.abs(first - np.median(first))))
    found = least_squares(residual, start, loss="huber", f_scale=max(1.345 * deviation, least), x_scale="jac")
    return [float(value) for value in found.x]


def fit_calibration(
    readings: Readings,
    space: Space,
    fit: Fit,
    min_depth: float,
    max_depth: float,
    *,
    limit: float | None = None,
    tolerance: float | None = 0.5,
    downweight: bool = False,
    origin: str = "",
) -> Calibration:
    """Fit a calibration and say how good it is.

    Args:
        readings: known distances.
        space: of scale and shift.
        fit: a factor of depth alone, or scale and shift.
        min_depth: of the model [m], kept.
        max_depth: of the model [m], see `limit`.
        limit: farthest calibrated depth [m]; None: in disparity the larger of `max_depth` and the farthest known
            distance (the calibrated inverse of `max_depth` may be infinite), else what `max_depth` becomes.
        tolerance: relative error after the fit beyond which a point contradicts the others; from four points on one
            that is off by three robust deviations and a quarter does too. None: nobody contradicts.
        downweight: accept points that contradict, in less than half of all; they do not move `max_depth` either.
        origin: sentence on the readings.

    Raises:
        ValueError: too few or contradictory points, which are named.
    """
    scale, shift = fit_line(readings, space, fit)
    wrong: list[int] = []
    if tolerance is not None and downweight:
        unlimited = Calibration(space, scale, shift, min_depth, LARGEST_DEPTH, origin)
        fitted = unlimited.metres(readings.predicted, readings.relative)
        wrong = contradictions(fitted, readings.metres, tolerance)
    trusted = np.delete(readings.metres, wrong) if 2 * len(wrong) < len(readings.metres) else readings.metres
    farthest = float(trusted.max())
    if limit is None:
        limit = max(max_depth if space == "disparity" else _mapped(space, scale, shift, max_depth), farthest)
    elif tolerance is not None and limit < farthest:
        raise UserError(
            f"max_depth {limit:g} m is nearer than a known distance, {farthest:g} m: raise it, or leave it out"
        )
    found = Calibration(space, scale, shift, min_depth, limit, origin)
    after = found.metres(readings.predicted, readings.relative)
    if tolerance is not None:
        wrong = contradictions(after, readings.metres, tolerance)
    if len(wrong) >= (max(1, len(after) / 2) if downweight else 1):
        advice = ["correct or remove them"]
        if fit == "scale":
            advice.append("fit scale and shift instead of the scale")
        if not downweight:
            advice.append("accept them with less weight (outliers downweight)")
        raise UserError(
            f"{stated_contradictions(readings, after, wrong)}: {', or '.join(advice)}"
            + ("; less weight does not tell which half is right" if downweight else "")
        )
    errors = {"after": _abs_rel(after, readings.metres)}
    if not readings.relative:
        errors = {"before": _abs_rel(readings.predicted, readings.metres), **errors}
    if (left_out := _left_out(readings, found, fit)) is not None:
        errors["left_out"] = left_out
    return replace(found, errors=errors)


def _mapped(space: Space, scale: float, shift: float, max_depth: float) -> float:
    """What becomes of `max_depth`; ValueError where that is no depth that anything has."""
    if space == "log_depth":
        mapped = math.exp(min(scale * math.log(max_depth) + shift, math.log(2 * LARGEST_DEPTH)))
    else:
        mapped = scale * max_depth + shift
    if mapped > LARGEST_DEPTH:
        raise UserError(
            f"the fit takes the model's farthest depth, {max_depth:g} m, beyond {LARGEST_DEPTH:g} m: check that the"
            " distances are in metres, add some that are nearer and farther apart, fit the scale only (fit scale), or"
            " say the farthest depth (max_depth)"
        )
    return mapped


def stated_contradictions(readings: Readings, fitted: np.ndarray, wrong: Sequence[int]) -> str:
    """Which points contradict the others or the model, with both distances of each."""
    if not wrong:
        return "no point contradicts the others"
    listed = "; ".join(
        f"{readings.names[i]}: measured {readings.metres[i]:.3g} m, the fit says {fitted[i]:.3g} m"
        for i in wrong
    )
    return f"{len(wrong)} of {len(fitted)} points contradict the others or the model ({listed})"


def contradictions(fitted: np.ndarray, metres: np.ndarray, tolerance: float) -> list[int]:
    """Indices of the points whose known distance a fit misses, as `fit_calibration` says; the worst first."""
    off = np.abs(np.log(fitted / metres))
    limit = math.log1p(tolerance)
    if len(off) >= 4:
        limit = min(limit, max(math.log(1.25), 3 * MAD_TO_SIGMA * float(np.median(off))))
    order = np.argsort(-off, kind="stable")
    return [int(index) for index in order if off[index] > limit]


def _left_out(readings: Readings, found: Calibration, fit: Fit) -> float | None:
    """Mean over groups of the error of each under a fit to the others; None where the others are too few."""
    errors, groups = [], np.unique(readings.group)
    if len(groups) < 2:
        return None
    for group in groups:
        own = readings.of(readings.group == group)
        try:
            scale, shift = fit_line(readings.of(readings.group != group), found.space, fit)
        except ValueError:  # too few or too alike without it
            return None
        other = replace(found, scale=scale, shift=shift)
        errors.append(_abs_rel(other.metres(own.predicted, own.relative), own.metres))
    return float(np.mean(errors))


def for_intrinsics(factor: float, min_depth: float, max_depth: float, origin: str) -> Calibration:
    """The calibration for a camera whose focal length, in shares of the image, is `factor` times that of training.

    What looks `factor` times larger looks so much nearer to the network than it is (a pinhole camera; Metric3D, Yin et
    al. 2023, section 3.1), so depth is multiplied by it.
    """
    return Calibration("depth", factor, 0.0, min_depth, max_depth * factor, origin)


def _abs_rel(predicted: np.ndarray, metres: np.ndarray) -> float:
    return float(np.mean(np.abs(predicted - metres) / metres))
