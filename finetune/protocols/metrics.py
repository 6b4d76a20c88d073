"""Metrics: one name, one formula, one unit and one direction each, in `METRIC`.

Of the pixels that count, p is the prediction, g the ground truth, both in metres, and d = ln p - ln g. Sources: delta,
abs_rel, sq_rel (its denominator is g, not g^2), rmse and rmse_log: Eigen et al. 2014, section 4.3; log10: Saxena et al.
2009 as in Laina et al. 2016; silog: BTS (Lee et al. 2019, `compute_errors` of its evaluation), which ZoeDepth and the
KITTI benchmark share. Eigen's scale-invariant error is silog / 100. The formulas of pairs of points are in
`finetune.scoring.pairwise`, those of iBims-1 in `finetune.scoring.ibims`, those of classes in
`finetune.scoring.classes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What a number is.

    Args:
        name: in results and options.
        heading: in tables.
        better: which way is better.
        formula: in plain text, with the letters of this module or of the module of its evaluator.
        unit: "" for none.
    """

    name: str
    heading: str
    better: Literal["higher", "lower"]
    formula: str
    unit: str = ""

    @property
    def column(self) -> str:
        """Heading, unit and direction, as short as can be."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.heading}{unit}{'↑' if self.better == 'higher' else '↓'}"


METRIC: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("delta1", "δ1", "higher", "share of pixels with max(p / g, g / p) < 1.25"),
            Metric("delta2", "δ2", "higher", "share of pixels with max(p / g, g / p) < 1.25^2"),
            Metric("delta3", "δ3", "higher", "share of pixels with max(p / g, g / p) < 1.25^3"),
            Metric("abs_rel", "AbsRel", "lower", "mean(abs(p - g) / g)"),
            Metric("sq_rel", "SqRel", "lower", "mean((p - g)^2 / g)", "m"),
            Metric("rmse", "RMSE", "lower", "sqrt(mean((p - g)^2))", "m"),
            Metric("rmse_log", "RMSElog", "lower", "sqrt(mean(d^2))"),
            Metric("log10", "log10", "lower", "mean(abs(log10 p - log10 g))"),
            Metric("silog", "SILog", "lower", "100 sqrt(mean(d^2) - mean(d)^2)"),
            Metric("top1", "top-1", "higher", "share of images whose class has the highest logit"),
            Metric("top5", "top-5", "higher", "share of images whose class is among the five highest logits"),
            Metric("class_top1", "top-1 of classes", "higher", "mean over classes of top1 of their images"),
            Metric(
                "miou",
                "mIoU",
                "higher",
                "mean over classes of intersection / union of the pixels of all images",
            ),
            Metric(
                "pixel_accuracy", "pixel accuracy", "higher", "share of labelled pixels with the right class"
            ),
            Metric(
                "class_accuracy", "class accuracy", "higher", "mean over classes of the share of their pixels"
            ),
            Metric("whdr", "WHDR", "lower", "share of unequal pairs ordered wrongly, ties wrong"),
            Metric("accuracy", "accuracy", "higher", "1 - whdr"),
            Metric("wkdr", "WKDR", "lower", "share of all pairs whose relation under the threshold is wrong"),
            Metric("wkdr_unequal", "WKDR unequal", "lower", "wkdr among unequal pairs"),
            Metric("wkdr_equal", "WKDR equal", "lower", "wkdr among equal pairs"),
            Metric(
                "pe_fla", "PE flat", "lower", "distance of predicted points of a plane from its fit", "cm"
            ),
            Metric("pe_ori", "PE orie", "lower", "angle between the fitted plane and the true one", "°"),
            Metric("dbe_acc", "DBE acc", "lower", "distance of near predicted edges to true ones", "px"),
            Metric("dbe_com", "DBE com", "lower", "distance of true edges to predicted ones", "px"),
            Metric(
                "dbe_com_sym",
                "DBE com sym",
                "lower",
                "distance of true and of predicted edges to the other kind, each at most 10",
                "px",
            ),
            Metric("dde_0", "DDE0", "higher", "share of pixels on their side of a plane at 3 m"),
            Metric("dde_m", "DDE-", "lower", "share of pixels predicted before that plane, but behind it"),
            Metric("dde_p", "DDE+", "lower", "share of pixels predicted behind that plane, but before it"),
        )
    }
)
METRICS = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
ORDINAL_METRICS = ("whdr", "accuracy", "wkdr")
WKDR_METRICS = ("wkdr", "wkdr_equal", "wkdr_unequal")
"""Of pairs of points, `finetune.scoring.pairwise` has their formulas."""
PLANE_METRICS = ("pe_fla", "pe_ori")
GEOMETRY_METRICS = (*PLANE_METRICS, "dbe_acc", "dbe_com", "dde_0", "dde_m", "dde_p")
"""Of iBims-1, `finetune.scoring.ibims` has their formulas."""
SYMMETRIC_GEOMETRY_METRICS = tuple({"dbe_com": "dbe_com_sym"}.get(name, name) for name in GEOMETRY_METRICS)
"""The same with the other version of DBE."""
PAIR_METRICS = (*ORDINAL_METRICS, *WKDR_METRICS[1:])
"""All metrics of pairs of points."""
