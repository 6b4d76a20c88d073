"""The steps of `finetune.protocols.Protocol` on maps of depth, and the evaluator that takes them.

Maps are [H, W]; a prediction of any size is of the whole frame.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from finetune.depth_data.sample import DepthSample
from finetune.protocols import Protocol
from finetune.protocols.metrics import METRICS
from finetune.scoring.alignment import Alignment, fit
from finetune.scoring.evaluator import Evaluator, NoValidPixels
from finetune.scoring.metrics import Columns, Row, depth_errors, mean_of_images, pooled_depth, summary
from finetune.scoring.pictures import Triptych
from spark.errors import UserError


def merge_flipped(protocol: Protocol, prediction: np.ndarray, of_mirrored: np.ndarray) -> np.ndarray:
    """Average the prediction of an image and that of its mirror image as `protocol` does.

    Both are `[H, W]` in metres (inverse depth where that is the protocol's space), the second as the model gave it, not
    flipped back. Values that are not finite stay so, for the evaluator to count.
    """
    both = [np.asarray(prediction, np.float64), np.asarray(of_mirrored, np.float64)[:, ::-1]]
    if protocol.clip_before_average:
        limits = protocol.min_depth, protocol.max_depth
        both = [np.where(np.isfinite(depth), depth.clip(*limits), depth) for depth in both]
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is what it should be
        return (both[0] + both[1]) / 2.0


class Prepared(NamedTuple):
    """A prediction in the space of the protocol, at the size of the ground truth."""

    values: np.ndarray
    """Depth [m], or its inverse, float64 `[H, W]`, finite."""

    nonfinite: int
    """How many values of the prediction were NaN or infinite, and were replaced."""

    nonpositive: int
    """How many were finite and not above 0 though they should be distances."""

    usable: bool
    """Whether any value was neither; without one all are `min_depth`, and nothing is fitted to them."""


def prepare_prediction(
    protocol: Protocol, prediction: np.ndarray, size: tuple[int, ...], *, inverse: bool = False
) -> Prepared:
    """Steps 1, 3 and 4 of `Protocol`.

    Args:
        protocol: which space, limits and resize.
        prediction: metres `[h, w]`.
        size: (H, W) of the ground truth.
        inverse: the prediction is inverse depth instead.
    """
    values = np.asarray(prediction, np.float64)
    known = np.isfinite(values)
    nonfinite = int(known.size - known.sum())
    inverted = inverse != (protocol.space == "disparity")
    # Scale and shift, where both are fitted, make what they like of a sign; but what has none has no inverse either.
    positive = inverted or protocol.alignment in ("none", "median", "log_depth")
    nonpositive = int((known & (values <= 0)).sum()) if positive else 0
    if inverted:
        known &= values > 0
        values = np.divide(1, values, out=np.full(values.shape, np.nan), where=known)
    if not (usable := nonfinite + nonpositive < values.size):
        values = np.full(
            values.shape, protocol.min_depth if protocol.space == "depth" else 1 / protocol.min_depth
        )
    elif protocol.space == "depth":
        values = np.nan_to_num(
            values, nan=protocol.min_depth, posinf=protocol.max_depth, neginf=protocol.min_depth
        )
    elif not known.all():
        values = np.where(known, values, values[known].min())
    return Prepared(resize(values, size, protocol.align_corners), nonfinite, nonpositive, usable)


def count_beyond(protocol: Protocol, prediction: np.ndarray, inverse: bool) -> int:
    """How many finite values are beyond the farthest depth of a protocol that takes metres as they are: another unit,
    most likely, if they are many."""
    if inverse or protocol.alignment != "none":
        return 0
    return int(((prediction > protocol.max_depth) & np.isfinite(prediction)).sum())


def resize(values: np.ndarray, size: tuple[int, ...], align_corners: bool) -> np.ndarray:
    """Bilinearly to (H, W) `size`, if it differs; float64."""
    if values.shape == tuple(size):
        return values
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    return F.interpolate(tensor, size=tuple(size), mode="bilinear", align_corners=align_corners)[0, 0].numpy()


def view_of(protocol: Protocol, values: np.ndarray) -> np.ndarray:
    """What the protocol takes of a map `[H, W]` of the whole frame, `[h, w]`; the map itself without a view."""
    for step, height, width in protocol.view:
        h, w = values.shape
        if step == "resize":
            rows, columns = nearest(h, height), nearest(w, width)
            values = values[np.ix_(rows, columns)]
            continue
        if h < height or w < width:
            raise UserError(
                f"protocol {protocol.name} takes {height}x{width} of the frame, and this is {h}x{w}: use ground truth"
                " at its native size"
            )
        if step == "bottom_crop":
            top, left = h - height, (w - width) // 2
        else:
            top, left = round((h - height) / 2), round((w - width) / 2)  # halves to even, as Python rounds
        values = values[top : top + height, left : left + width]
    return values


def nearest(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels in a row stand for each of `new` ones, by Pillow: the codes that resize with it get what
    it chooses where two are as near."""
    index = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(index.resize((new, 1), Image.Resampling.NEAREST))[0]


def _valid(protocol: Protocol, ground_truth: np.ndarray) -> np.ndarray:
    # In the type of the ground truth: 1 mm as float32 is a hair above 1e-3, and must not count.
    low, high = (ground_truth.dtype.type(end) for end in (protocol.min_depth, protocol.max_depth))
    if protocol.valid == "positive":
        return (ground_truth > 0) & (ground_truth < np.inf)
    if protocol.valid == "closed":
        return (ground_truth >= low) & (ground_truth <= high)
    return (ground_truth > low) & (ground_truth < high)


class Counted(NamedTuple):
    """The pixels of an image that count."""

    prediction: np.ndarray
    """In the space of the protocol, `[N]`."""

    ground_truth: np.ndarray
    """[m] `[N]`."""

    alignment: Alignment
    """What brings such predictions to metres."""


def count_pixels(protocol: Protocol, prepared: Prepared, ground_truth: np.ndarray) -> Counted:
    """Steps 5 to 7 of `Protocol`, without the clip. Nothing is fitted to a prediction that is not usable.

    Raises:
        NoValidPixels: no pixel of the ground truth counts.
        ValueError: arrays that are not depth maps, or ground truth of a size that the protocol does not take.
    """
    if ground_truth.ndim != 2 or not np.issubdtype(ground_truth.dtype, np.floating):
        raise UserError(
            f"ground truth is depth in metres, floating point [H, W]: this is {ground_truth.dtype}"
            f" {list(ground_truth.shape)}"
        )
    top, bottom, left, right = protocol.crop_at(ground_truth.shape)
    truth = view_of(protocol, ground_truth)[top:bottom, left:right]
    counts = _valid(protocol, truth)
    if not counts.any():
        raise NoValidPixels(f"no pixel of {valid_text(protocol)} in the {protocol.name} crop")
    predicted = view_of(protocol, prepared.values)[top:bottom, left:right][counts]
    g = truth[counts].astype(np.float64)
    limits = protocol.min_depth, protocol.max_depth
    if not prepared.usable:
        return Counted(predicted, g, Alignment(protocol.alignment, 1.0, 0.0, *limits))
    return Counted(predicted, g, fit(protocol.alignment, _fitted_space(protocol, predicted), g, *limits))


def valid_text(protocol: Protocol) -> str:
    """Which ground truth counts, in a formula."""
    low, high = f"{protocol.min_depth:g}", f"{protocol.max_depth:g}"
    return {
        "strict": f"{low} < depth < {high} m",
        "closed": f"{low} <= depth <= {high} m",
        "positive": "depth > 0",
    }[protocol.valid]


def _fitted_space(protocol: Protocol, values: np.ndarray) -> np.ndarray:
    """Values of the protocol's space in the space that its alignment is fitted in: depth, or inverse depth."""
    if protocol.space == "depth" or protocol.alignment == "disparity":
        return values
    # Inverse depth of 0 or less has no depth; it is the farthest.
    return 1 / np.maximum(values, 1e-9)


def to_metres(protocol: Protocol, alignment: Alignment, values: np.ndarray) -> np.ndarray:
    """Step 7 of `Protocol`: prepared values, of any shape, aligned and clipped; metres above 0."""
    depth = alignment.apply(_fitted_space(protocol, values))
    if protocol.clip:
        return depth.clip(protocol.min_depth, protocol.max_depth)
    return np.where(depth > 0, depth, protocol.min_depth)


def metric_prediction(
    protocol: Protocol, prediction: np.ndarray, ground_truth: np.ndarray, *, inverse: bool = False
) -> np.ndarray:
    """The whole prediction as it is compared with ground truth `[H, W]` [m], of which some pixel counts: metres
    float64 `[H, W]`, aligned and clipped; for pictures."""
    prepared = prepare_prediction(protocol, prediction, ground_truth.shape, inverse=inverse)
    return to_metres(protocol, count_pixels(protocol, prepared, ground_truth).alignment, prepared.values)


def score_pair(
    protocol: Protocol, prediction: np.ndarray, ground_truth: np.ndarray, *, inverse: bool = False
) -> dict[str, float]:
    """Score one prediction `[h, w]` [m] against ground truth `[H, W]` [m], 0 = no reading, under `protocol`.

    Returns:
        what `depth_errors` gives, with `nonfinite` and `nonpositive` of `Prepared`.

    Raises:
        NoValidPixels: no pixel of the ground truth counts.
        ValueError: arrays that are not depth maps, or ground truth of a size that the protocol does not take.
    """
    prepared = prepare_prediction(protocol, prediction, ground_truth.shape[:2], inverse=inverse)
    counted = count_pixels(protocol, prepared, ground_truth)
    errors = depth_errors(to_metres(protocol, counted.alignment, counted.prediction), counted.ground_truth)
    return {**errors, "nonfinite": prepared.nonfinite, "nonpositive": prepared.nonpositive}


class DepthEvaluator(Evaluator):
    """Scores maps of depth in metres."""

    columns = ("delta1", "delta2", "delta3", "abs_rel", "rmse", "log10", "silog")
    draws = True

    def __init__(self, protocol: Protocol, *, skip_empty: bool = False) -> None:
        super().__init__(protocol, skip_empty=skip_empty)
        self._crop_scaled = False
        self._beyond: list[
            tuple[int, int]
        ] = []  # of each image: values beyond the farthest depth, and all values

    @classmethod
    def check_sample(cls, protocol: Protocol, sample: DepthSample) -> None:
        """The crop must exist in ground truth of this size."""
        super().check_sample(protocol, sample)
        protocol.crop_at(sample.metres.shape)

    @classmethod
    def unusable_text(cls, settings: Mapping[str, Any]) -> str:
        """They become the nearest depth."""
        return f"scored as {settings.get('min_depth', 0.001):g} m everywhere, with nothing fitted"

    @classmethod
    def nonfinite_text(cls, settings: Mapping[str, Any]) -> str:
        """They become an end of the range."""
        end = "farthest" if settings.get("space") == "disparity" else "nearest or farthest"
        return f"scored as the {end} depth"

    def picture(
        self, sample: DepthSample, prediction: np.ndarray, inverse: bool, row: Row | None
    ) -> Triptych:
        """The prediction in metres beside its ground truth."""
        if row and (inverse or self.protocol.alignment != "none"):
            prediction = metric_prediction(self.protocol, prediction, sample.metres, inverse=inverse)
        caption = summary(row) if row else "no pixel of the ground truth counts"
        return Triptych(sample.image, sample.metres, prediction, sample.name, caption)

    def score(self, sample: DepthSample, prediction: np.ndarray, inverse: bool) -> Row:
        """See `score_pair`."""
        crop = self.protocol.crop
        if crop is not None and self.protocol.crop_at(sample.metres.shape) != crop:
            self._crop_scaled = True
        self._beyond.append((count_beyond(self.protocol, prediction, inverse), prediction.size))
        return score_pair(self.protocol, prediction, sample.metres, inverse=inverse)

    @classmethod
    def aggregate(cls, columns: Columns, counts: np.ndarray, aggregation: str) -> dict[str, np.ndarray]:
        """Means over images, or over pixels."""
        if aggregation == "pooled":
            return pooled_depth(columns, counts)
        return mean_of_images(columns, counts, METRICS)

    def extras(self) -> dict[str, Any]:
        """crop_scaled: a crop other than the protocol's own was used; beyond_*: what `count_beyond` counts, if any."""
        beyond = [count for count, _ in self._beyond if count]
        extras: dict[str, Any] = {"crop_scaled": self._crop_scaled}
        if beyond:
            share = sum(beyond) / sum(size for _, size in self._beyond)
            extras |= {
                "beyond_pixels": sum(beyond),
                "beyond_images": len(beyond),
                "beyond_share": round(share, 4),
            }
        return extras
