"""Protocols that score the order of pairs of points."""

from finetune.protocols.metrics import ORDINAL_METRICS, WKDR_METRICS
from finetune.protocols.record import Protocol

PAIRS = (
    Protocol(
        name="diw",
        description="Depth in the Wild (Chen et al. 2016): share of the pairs of points ordered wrongly, ties"
        " wrong, read at the pixels of the photo.",
        tables="Chen et al. 2016 and later WHDR tables of DIW",
        source="umich-vl/relative_depth src/experiment/test_model_on_DIW.lua; torch/image generic/image.c, "
        "which enlarges by corners",
        family="relations",
        min_depth=1e-3,
        max_depth=10.0,
        supervision="ordinal",
        align_corners=True,
        aggregation="pooled",
        metrics=ORDINAL_METRICS,
    ),
    Protocol(
        name="nyu-wkdr",
        description="NYU Depth V2 by the pairs of points of Zoran et al. 2015, as Chen et al. 2016: the model"
        " sees the image without a border of 10 px; threshold of equally far points among 140 on a validation"
        " set.",
        tables="Zoran et al. 2015, Chen et al. 2016, Xian et al. 2018",
        source="umich-vl/relative_depth src/experiment/test_model_on_NYU.lua",
        data="nyu",
        family="relations",
        min_depth=1e-3,
        max_depth=10.0,
        supervision="ordinal",
        sees="inside_border",
        align_corners=True,
        metrics=WKDR_METRICS,
        expected_images=654,
        options=(("border", 10), ("thresholds", 140)),
    ),
    Protocol(
        name="nyu-wkdr-sampled",
        description="nyu-wkdr with 800 pairs of points of each depth map, drawn with a fixed seed, equally far"
        " within 2 %: not to be compared with publications.",
        data="nyu",
        family="relations",
        min_depth=1e-3,
        max_depth=10.0,
        sees="inside_border",
        align_corners=True,
        metrics=WKDR_METRICS,
        options=(("border", 10), ("pairs", 800), ("ratio", 1.02), ("seed", 0), ("thresholds", 140)),
    ),
    Protocol(
        name="redweb",
        description="WHDR on 10,000 pairs of points of each map of relative depth, drawn with a fixed seed,"
        " left out where their disparities are within 2 %: not to be compared with publications.",
        data="redweb",
        family="relations",
        min_depth=1e-3,
        max_depth=10.0,
        supervision="affine",
        aggregation="pooled",
        metrics=("whdr", "accuracy"),
        options=(("pairs", 10_000), ("ratio", 1.02), ("seed", 0)),
    ),
)
