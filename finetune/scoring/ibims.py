"""Scores of iBims-1 that look at the geometry of a prediction (Koch et al. 2018, arXiv 1805.01328, section 3).

| name | what it is | unit |
|---|---|---|
| dde_0 | share of pixels that are predicted on their side of a plane at 3 m | |
| dde_m | share of pixels that are predicted before it and lie behind it: too near | |
| dde_p | share of pixels that are predicted behind it and lie before it: too far | |
| dbe_acc | mean distance to the nearest true edge, of predicted edges that are less than 10 px from one | px |
| dbe_com | mean distance to the nearest predicted edge, of all true edges | px |
| dbe_com_sym | mean distance to the nearest edge of the other kind, of all edges of both, each at most 10 px | px |
| pe_fla | flatness: deviation of the predicted points of a true plane from the plane fitted to them | cm |
| pe_ori | orientation: angle between that fitted plane and the true one | degrees |

The paper leaves open how edges are found and planes fitted; here it is as in the Python scripts that come with the data
(`evaluate_ibims_error_metrics.py`), whose authors note that their edges are not those of the MATLAB code of the paper.
So DBE stands beside tables that were made with these scripts, not beside those of the paper.

There are two versions of the scripts; `Protocol.edges` chooses one. "directed": the Canny thresholds
are 0.1 and 0.2, completeness is dbe_com, with nothing cut off. "symmetric" (copies in the repositories YiLiM1/DANet and
xuefeng-cvr/BS-Net): they are 0.15 and 0.3, completeness is dbe_com_sym, and dbe_acc has one formula, but other edges.
Both scripts call it dbe_com: published ones above 10 px are directed, others may be either. The other scores are alike.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.feature import canny

from finetune.depth_data.sample import DepthSample, Plane
from finetune.protocols import Protocol
from finetune.protocols.metrics import METRIC, PLANE_METRICS
from finetune.scoring.depth import DepthEvaluator, resize
from finetune.scoring.evaluator import NoValidPixels
from finetune.scoring.metrics import Columns, Row, depth_errors, mean_of_images
from spark.errors import UserError

PLANE_SHARE = 0.05
"""Least share of the image that a plane must cover with pixels that count."""
EDGE_REACH = 10.0
"""Distance [px] from a true edge from which on an edge of the prediction is another one; the score without edges."""
SIGMA = math.sqrt(2)
"""Of the Canny edges of a prediction that fills [0, 1]."""
THRESHOLDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"directed": (0.1, 0.2), "symmetric": (0.15, 0.3)}
)
"""`Protocol.edges` -> low and high threshold of these edges."""


def directed_errors(prediction: np.ndarray, ground_truth: np.ndarray, plane: float = 3.0) -> dict[str, float]:
    """DDE of the pixels that count.

    Args:
        prediction: metres, any shape.
        ground_truth: metres, the same shape, not empty.
        plane: distance of the plane [m]; what lies in it is before it.
    """
    before, truly = prediction <= plane, ground_truth <= plane
    return {
        "dde_0": float((before == truly).mean()),
        "dde_m": float((before & ~truly).mean()),
        "dde_p": float((~before & truly).mean()),
    }


def boundary_errors(
    prediction: np.ndarray, edges: np.ndarray, version: Literal["directed", "symmetric"] = "directed"
) -> dict[str, float]:
    """DBE of a whole prediction, whichever of its pixels count otherwise.

    Args:
        prediction: metres `[H, W]`; 0 and NaN are no prediction.
        edges: true edges, bool `[H, W]`.
        version: of the script, see above.

    Returns:
        dbe_acc, and dbe_com or of the symmetric version dbe_com_sym: both NaN where there is no true edge; both
        `EDGE_REACH` where no edge of the prediction is near a true one.
    """
    completeness = "dbe_com" if version == "directed" else "dbe_com_sym"
    if not edges.any():
        return {"dbe_acc": math.nan, completeness: math.nan}
    found = depth_edges(prediction, version)
    to_truth = np.asarray(distance_transform_edt(~edges))
    near = found & (to_truth < EDGE_REACH)
    if not near.any():
        return {"dbe_acc": EDGE_REACH, completeness: EDGE_REACH}
    distances = np.asarray(distance_transform_edt(~found))[edges]
    if version == "symmetric":
        distances = np.concatenate([distances, to_truth[found]]).clip(max=EDGE_REACH)
    return {"dbe_acc": float(to_truth[near].mean()), completeness: float(distances.mean())}


def depth_edges(prediction: np.ndarray, version: Literal["directed", "symmetric"] = "directed") -> np.ndarray:
    """Canny edges of a prediction `[H, W]` brought to [0, 1], bool `[H, W]`; a flat one has none."""
    values = np.where(prediction == 0, np.nan, prediction).astype(np.float32)
    known = np.isfinite(values)
    if not known.any() or (span := values[known].max() - (nearest := values[known].min())) == 0:
        return np.zeros(prediction.shape, bool)
    low, high = THRESHOLDS[version]
    return canny((values - nearest) / span, sigma=SIGMA, low_threshold=low, high_threshold=high)


def planarity_errors(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    valid: np.ndarray,
    plane: Plane,
    camera: tuple[float, float, float, float],
) -> dict[str, float] | None:
    """PE of a plane: the prediction, scaled to the median depth of the plane, is projected back and a plane fitted.

    Args:
        prediction: metres `[H, W]`, above 0 where valid.
        ground_truth: metres `[H, W]`.
        valid: pixels that count, bool `[H, W]`.
        plane: the plane.
        camera: fx, fy, cx, cy [px], the middle of the first pixel at (1, 1).

    Returns:
        None for a plane of which less than `PLANE_SHARE` of the image counts.
    """
    inside = plane.mask & valid
    if inside.sum() / inside.size < PLANE_SHARE:
        return None
    depth = prediction[inside].astype(np.float64)
    depth = depth * (np.median(ground_truth[inside]) / np.median(depth))
    fx, fy, cx, cy = camera
    row, column = np.nonzero(inside)
    # x right, y ahead, z up, as the normals of the data set have them
    points = np.stack([(column + 1 - cx) * depth / fx, depth, -(row + 1 - cy) * depth / fy])
    spreads, axes = np.linalg.eigh(np.cov(points, bias=True))
    fitted = axes[:, 0]  # the direction in which the points spread least
    across, along = np.linalg.norm(np.cross(plane.normal, fitted)), abs(plane.normal @ fitted)
    return {
        "pe_fla": 100.0 * math.sqrt(max(spreads[0], 0.0)),
        "pe_ori": math.degrees(math.atan2(across, along)),
    }


class IBimsEvaluator(DepthEvaluator):
    """Scores iBims-1: the metrics of depth over the pixels that count, with PE, DBE and DDE.

    A pixel counts where there is ground truth and a prediction: one that is finite and above 0. Others are left out, as
    the official scripts do with 0 and NaN, and counted (`unpredicted`). A prediction without any such pixel is not left
    out: it is scored as `min_depth` everywhere, without planes. Nothing is clipped. DBE looks at the whole prediction.
    The means are over the images that have a score, of PE over all planes of all images.
    """

    @classmethod
    def check_sample(cls, protocol: Protocol, sample: DepthSample) -> None:
        """Edges and planes must be known."""
        super().check_sample(protocol, sample)
        if sample.geometry is None:
            raise UserError(
                f"protocol {protocol.name} needs edges and planes: unpack ibims1_core_mat.zip of iBims-1 beside"
                " ibims1_core_raw, or use --protocol ibims-zoedepth, which scores depth alone"
            )

    def score(self, sample: DepthSample, prediction: np.ndarray, inverse: bool) -> Row:
        """The row of an image; PE is the mean over its `planes`."""
        self.check_sample(self.protocol, sample)
        truth, geometry = sample.metres, sample.geometry
        assert geometry is not None
        values = np.asarray(prediction, np.float64)
        finite = np.isfinite(values)
        nonfinite, nonpositive = int((~finite).sum()), int((finite & (values <= 0)).sum())
        if inverse:
            with np.errstate(divide="ignore"):
                values = 1 / values
        known = np.isfinite(values) & (values > 0)
        depth = resize(np.where(known, values, 0), truth.shape, self.protocol.align_corners)
        # A pixel that a missing value was resized into is missing, too.
        predicted = resize(known.astype(np.float64), truth.shape, self.protocol.align_corners) > 1 - 1e-6
        depth = np.where(predicted, depth, 0)
        if not (usable := known.any()):
            depth, predicted = np.full(truth.shape, self.protocol.min_depth), np.ones(truth.shape, bool)
        valid = (truth > 0) & predicted
        if not valid.any():
            raise NoValidPixels("no pixel has both ground truth and a prediction above 0")
        p, g = depth[valid], truth[valid].astype(np.float64)
        row: Row = {**depth_errors(p, g), **directed_errors(p, g)}
        row |= boundary_errors(depth, geometry.edges, self.protocol.edges)
        planes = [
            errors
            for plane in (geometry.planes if usable else ())
            if (errors := planarity_errors(depth, truth, valid, plane, geometry.camera)) is not None
        ]
        for name in ("pe_fla", "pe_ori"):
            row[name] = sum(errors[name] for errors in planes) / len(planes) if planes else None
        row = {name: None if value != value else value for name, value in row.items()}  # NaN: not defined
        unpredicted = int(((truth > 0) & ~predicted).sum())
        counts = {"planes": len(planes), "unpredicted": unpredicted}
        return {**row, **counts, "nonfinite": nonfinite, "nonpositive": nonpositive}

    @classmethod
    def aggregate(cls, columns: Columns, counts: np.ndarray, aggregation: str) -> dict[str, np.ndarray]:
        """Means over images, of PE over planes."""
        of_images = [name for name in METRIC if name in columns and name not in PLANE_METRICS]
        means = mean_of_images(columns, counts, of_images)
        return means | mean_of_images(columns, counts * columns["planes"], PLANE_METRICS)

    def extras(self) -> dict[str, Any]:
        """planes: how many were scored; unpredicted_pixels: pixels with ground truth that were left out."""
        return {
            "planes": sum(row["planes"] for row in self.rows.values()),
            "unpredicted_pixels": sum(row["unpredicted"] for row in self.rows.values()),
        }
