"""Named evaluation protocols: which pixels count, what happens to a prediction first, and what is averaged.

Numbers of two protocols cannot be compared: on NYU the crop, the cap, flip averaging and pooling each move
RMSE by more than separates published models. So a protocol is data with a name, results carry the name and
every setting, and nothing is adapted on the quiet: ground truth of another size, for instance, is an error
unless the protocol scales its crop.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from finetune.metrics import METRICS, ORDINAL_METRICS, ErrorSums, error_sums, mean_metrics


class NoValidPixels(ValueError):
    """Not one ground-truth pixel of an image counts, so it has no score."""


@dataclass(frozen=True)
class Protocol:
    """How predictions are compared with ground truth. Steps in this order:

    1. With `flip_average`, the predictions of the image and of its mirror image are averaged
       (`merge_flipped`), each clipped first if `clip_before_average`.
    2. NaN and -inf in a prediction become `min_depth`, +inf becomes `max_depth`, and they are counted. The
       values are those that the BTS code ends up with; the replacement comes before the resize so that one
       bad pixel does not spread. NaN thereby scores about as badly as a depth can (1 mm), never dropped.
    3. Bilinear resize to the size of the ground truth, if it differs.
    4. Clip to [min_depth, max_depth] at that size; with `alignment`, bring it to metres first.
    5. Pixels with min_depth < ground truth < max_depth, both strict, inside the crop, count.
    6. Metrics per image and their mean over images, or over all pixels pooled.

    Args:
        name: what results call it.
        description: one sentence with the source.
        min_depth: lower end of the depths that count [m].
        max_depth: upper end of the depths that count [m].
        crop: (top, bottom, left, right) of the pixels that count, half open, in a frame of `frame`; None: all
            of them.
        frame: (H, W) of the ground truth that the crop is given for; None: any size.
        scale_crop: accept ground truth of another size than `frame`, with the crop scaled in proportion and
            rounded.
        aggregation: "per_image": mean over images of each image's metric; "pooled": one metric over all
            pixels.
        flip_average: whether the prediction is averaged with that of the mirror image.
        clip_before_average: clip both predictions to [min_depth, max_depth] before they are averaged.
        align_corners: of the bilinear resize: whether the centres of the corner pixels (True) or the outer
            edges of the image (False) coincide.
        alignment: "none": predictions are metres. "disparity": they are inverse depth up to scale and shift, which
            are fitted to each image's inverse ground truth by least squares over the pixels that count, before 1 / it
            is clipped (as MiDaS is evaluated). The ground truth helps the prediction: such numbers say what a model
            knows of shape, and do not stand beside metric ones.
        depth: the kind of ground truth that published numbers of this protocol stand on; whoever opens the
            data chooses it.
        expected_images: how many images the official list has; results state it beside the number that was
            scored.
        supervision: what the ground truth is. "metric": maps in metres. "ordinal": pairs of points, scored as
            `finetune.ordinal` says; depth limits, crop and alignment are of no use then.
        threshold: with "ordinal", largest difference at which a prediction says that two points are equally far (in
            metres, or in the unit of inverse depth of a head without metres).
    """

    name: str
    description: str
    min_depth: float
    max_depth: float
    crop: tuple[int, int, int, int] | None = None
    frame: tuple[int, int] | None = None
    scale_crop: bool = False
    aggregation: Literal["per_image", "pooled"] = "per_image"
    flip_average: bool = False
    clip_before_average: bool = False
    align_corners: bool = False
    alignment: Literal["none", "disparity"] = "none"
    depth: Literal["raw", "filled"] = "raw"
    expected_images: int | None = None
    supervision: Literal["metric", "ordinal"] = "metric"
    threshold: float = 0.0

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"{self.name}: threshold must be 0 or more, not {self.threshold}")
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"{self.name}: depths must satisfy 0 < min_depth < max_depth")
        if self.crop is not None and self.frame is None:
            raise ValueError(f"{self.name}: a crop needs the frame that its pixels are counted in")
        if self.alignment not in ("none", "disparity"):
            raise ValueError(f"{self.name}: alignment is 'none' or 'disparity', not {self.alignment!r}")
        if self.aggregation not in ("per_image", "pooled"):
            raise ValueError(f"{self.name}: aggregation is 'per_image' or 'pooled', not {self.aggregation!r}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics by which models can be compared."""
        return ORDINAL_METRICS if self.supervision == "ordinal" else METRICS

    def crop_at(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the pixels that count in ground truth of (H, W) `size`.

        Raises:
            ValueError: another size than `frame`, and the protocol does not scale its crop.
        """
        height, width = size
        if self.frame is not None and tuple(size) != self.frame and not self.scale_crop:
            raise ValueError(
                f"protocol {self.name} is defined on ground truth of {self.frame[0]}x{self.frame[1]}, this is"
                f" {height}x{width}: use ground truth at its native size, or a protocol that scales its crop"
                " (such as nyu-bts-scaled), whose numbers must not stand beside published ones"
            )
        if self.crop is None or self.frame is None:
            return 0, height, 0, width
        top, bottom, left, right = self.crop
        vertical, horizontal = height / self.frame[0], width / self.frame[1]
        return (
            round(top * vertical),
            round(bottom * vertical),
            round(left * horizontal),
            round(right * horizontal),
        )


_NYU_BTS = Protocol(
    name="nyu-bts",
    description="NYU Depth V2 as BTS (Lee et al. 2019): raw depth, 1e-3 < gt < 10 m, crop 45:471, 41:601.",
    min_depth=1e-3,
    max_depth=10.0,
    crop=(45, 471, 41, 601),
    frame=(480, 640),
    expected_images=654,
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            _NYU_BTS,
            replace(
                _NYU_BTS,
                name="nyu-bts-scaled",
                description="nyu-bts with its crop scaled to any size: not to be compared with publications.",
                scale_crop=True,
                expected_images=None,
            ),
            replace(
                _NYU_BTS,
                name="nyu-affine",
                description="nyu-bts for relative depth: scale and shift of each image fitted in inverse depth,"
                " crop scaled to any size.",
                scale_crop=True,
                alignment="disparity",
            ),
            Protocol(
                name="diw",
                description="Depth in the Wild (Chen et al. 2016): share of the pairs of points ordered wrongly, ties"
                " wrong, read at the pixels of the photo.",
                min_depth=1e-3,
                max_depth=10.0,
                supervision="ordinal",
            ),
        )
    }
)


def get_protocol(name: str, *, flip_average: bool | None = None, threshold: float | None = None) -> Protocol:
    """A protocol of the registry, with flip averaging switched on or off and another threshold of relations if asked;
    results state which it was.

    Raises:
        ValueError: no such protocol, with the nearest name; or a threshold of one that has none.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no evaluation protocol {name!r}: {hint}known: {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if threshold is not None:
        if protocol.supervision != "ordinal":
            raise ValueError(f"threshold is for relations of points (protocol diw), not {name}: leave it out")
        protocol = replace(protocol, threshold=threshold)
    return protocol if flip_average is None else replace(protocol, flip_average=flip_average)


def merge_flipped(protocol: Protocol, prediction: np.ndarray, of_mirrored: np.ndarray) -> np.ndarray:
    """Average the prediction of an image and that of its mirror image as `protocol` does.

    Both are `[H, W]` in metres, the second as the model gave it, not flipped back. Values that are not finite
    stay so, for `evaluate_pair` to count.
    """
    both = [np.asarray(prediction, np.float64), np.asarray(of_mirrored, np.float64)[:, ::-1]]
    if protocol.clip_before_average and protocol.alignment == "none":
        limits = protocol.min_depth, protocol.max_depth
        both = [np.where(np.isfinite(depth), depth.clip(*limits), depth) for depth in both]
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is what it should be
        return (both[0] + both[1]) / 2.0


@dataclass(frozen=True)
class PairScore:
    """One image, scored.

    Args:
        sums: the sums behind the metrics.
        nonfinite: how many values of the prediction were NaN or infinite and were replaced.
        crop: (top, bottom, left, right) that was used [px].
    """

    sums: ErrorSums
    nonfinite: int
    crop: tuple[int, int, int, int]

    def row(self) -> dict[str, float]:
        """The metrics with `pixels`, how many were compared, and `nonfinite`."""
        return {**self.sums.metrics(), "pixels": self.sums.pixels, "nonfinite": self.nonfinite}


def valid_pixels(protocol: Protocol, ground_truth: np.ndarray) -> np.ndarray:
    """Which pixels of ground truth `[H, W]` [m] count, bool `[H, W]`; ValueError for a wrong size."""
    top, bottom, left, right = protocol.crop_at(ground_truth.shape)
    counts = np.zeros(ground_truth.shape, bool)
    inner = ground_truth[top:bottom, left:right]
    # In the type of the ground truth: 1 mm as float32 is a hair above 1e-3, and must not count.
    low, high = inner.dtype.type(protocol.min_depth), inner.dtype.type(protocol.max_depth)
    counts[top:bottom, left:right] = (inner > low) & (inner < high)
    return counts


def prepare_prediction(
    protocol: Protocol, prediction: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, int]:
    """Steps 2 to 4 of `Protocol`.

    Args:
        protocol: which clip and resize.
        prediction: metres `[h, w]`.
        size: (H, W) of the ground truth.

    Returns:
        float64 `[H, W]` within [min_depth, max_depth], and how many values were not finite.
    """
    if prediction.ndim != 2:
        raise ValueError(f"a prediction is depth in metres [H, W], this has shape {list(prediction.shape)}")
    depth = np.asarray(prediction, np.float64)
    nonfinite = int(depth.size - np.isfinite(depth).sum())
    depth = np.nan_to_num(depth, nan=protocol.min_depth, posinf=protocol.max_depth, neginf=protocol.min_depth)
    depth = resize(depth, size, protocol.align_corners)
    return depth.clip(protocol.min_depth, protocol.max_depth), nonfinite


def score_pair(protocol: Protocol, prediction: np.ndarray, ground_truth: np.ndarray) -> PairScore:
    """Score one prediction `[h, w]` [m] against ground truth `[H, W]` [m], 0 = no reading, as `protocol`
    says.

    Raises:
        NoValidPixels: no pixel of the ground truth counts.
        ValueError: arrays that are not depth maps, or ground truth of a size that the protocol does not take.
    """
    if ground_truth.ndim != 2 or not np.issubdtype(ground_truth.dtype, np.floating):
        raise ValueError(
            f"ground truth is depth in metres, floating point [H, W]: this is {ground_truth.dtype}"
            f" {list(ground_truth.shape)}"
        )
    counts = valid_pixels(protocol, ground_truth)
    if not counts.any():
        raise NoValidPixels(
            f"no pixel with {protocol.min_depth} < depth < {protocol.max_depth} m in the {protocol.name} crop"
        )
    depth, nonfinite = metric_prediction(protocol, prediction, ground_truth)
    crop = protocol.crop_at(ground_truth.shape)
    return PairScore(error_sums(depth[counts], ground_truth[counts]), nonfinite, crop)


def metric_prediction(
    protocol: Protocol, prediction: np.ndarray, ground_truth: np.ndarray
) -> tuple[np.ndarray, int]:
    """What is compared with ground truth `[H, W]` [m], of which some pixel counts: `prepare_prediction`, aligned.

    Returns:
        metres float64 `[H, W]`, and how many values of the prediction were not finite.
    """
    if protocol.alignment == "none":
        return prepare_prediction(protocol, prediction, ground_truth.shape)
    finite = np.isfinite(prediction)
    farthest = float(prediction[finite].min()) if finite.any() else 0.0
    # Inverse depth has no limits of its own: bad values become the farthest of the others, and nothing is clipped.
    unlimited = np.where(finite, prediction, farthest).astype(np.float64)
    inverse = resize(unlimited, ground_truth.shape, protocol.align_corners)
    counts = valid_pixels(protocol, ground_truth)
    matrix = np.stack((inverse[counts], np.ones(int(counts.sum()))), 1)
    scale, shift = np.linalg.lstsq(matrix, 1 / ground_truth[counts].astype(np.float64), rcond=None)[0]
    aligned = (scale * inverse + shift).clip(1 / protocol.max_depth, 1 / protocol.min_depth)
    return 1 / aligned, int(finite.size - finite.sum())


def resize(values: np.ndarray, size: tuple[int, ...], align_corners: bool) -> np.ndarray:
    """Bilinearly to (H, W) `size`, if it differs; float64."""
    if values.shape == tuple(size):
        return values
    tensor = torch.from_numpy(values)[None, None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=align_corners)[0, 0].numpy()


def evaluate_pair(protocol: Protocol, prediction: np.ndarray, ground_truth: np.ndarray) -> dict[str, float]:
    """Metrics of one image with `pixels` and `nonfinite`; see `score_pair`."""
    return score_pair(protocol, prediction, ground_truth).row()


class ProtocolEvaluator:
    """Scores a data set image by image.

    >>> evaluator = ProtocolEvaluator(get_protocol("nyu-bts"))
    >>> evaluator.add(sample.name, prediction, sample.depth)  # for every image
    >>> write_results("results.json", evaluator.results())

    Args:
        protocol: how.
        skip_empty: leave out images without a valid pixel, and list them in the results, instead of raising.
    """

    def __init__(self, protocol: Protocol, *, skip_empty: bool = False):
        self.protocol, self.skip_empty = protocol, skip_empty
        self._scores: dict[str, PairScore] = {}
        self._skipped: list[str] = []

    def add(self, name: str, prediction: np.ndarray, ground_truth: np.ndarray) -> dict[str, float] | None:
        """Score one image.

        Args:
            name: of the image, unique.
            prediction: metres `[h, w]`, any size. When the protocol averages over flips, the result of
                `merge_flipped`.
            ground_truth: metres `[H, W]`, 0 = no reading.

        Returns:
            its row: metrics, `pixels`, `nonfinite`; None if it was skipped.

        Raises:
            NoValidPixels: nothing to compare, unless `skip_empty`.
            ValueError: a name for the second time, or what `score_pair` raises; the message starts with the
                name.
        """
        if name in self._scores or name in self._skipped:
            raise ValueError(f"{name} was scored already: does the list name it twice?")
        try:
            self._scores[name] = score_pair(self.protocol, prediction, ground_truth)
        except NoValidPixels as error:
            if not self.skip_empty:
                raise NoValidPixels(
                    f"{name}: {error}; skip_empty leaves such images out and lists them"
                ) from error
            self._skipped.append(name)
            return None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return self._scores[name].row()

    def results(self) -> dict:
        """What results.json holds.

        Returns:
            protocol, images (how many were scored), metrics, per_image (name, metrics, pixels, nonfinite);
            and what a reader must know: settings (all of the protocol), crop_scaled (a crop other than the
            protocol's own was used), skipped (names without a valid pixel), nonfinite_pixels and
            nonfinite_images (replaced predictions).

        Raises:
            ValueError: no image was scored.
        """
        scores = self._scores.values()
        rows = [{"name": name, **score.row()} for name, score in self._scores.items()]
        metrics = mean_metrics(rows)
        if self.protocol.aggregation == "pooled":
            first, *others = (score.sums for score in scores)
            metrics = sum(others, start=first).metrics()
        return {
            "protocol": self.protocol.name,
            "images": len(rows),
            "metrics": metrics,
            "crop_scaled": any(
                self.protocol.crop is not None and score.crop != self.protocol.crop for score in scores
            ),
            "nonfinite_pixels": sum(score.nonfinite for score in scores),
            "nonfinite_images": sum(score.nonfinite > 0 for score in scores),
            "skipped": list(self._skipped),
            "settings": asdict(self.protocol),
            "per_image": rows,
        }
