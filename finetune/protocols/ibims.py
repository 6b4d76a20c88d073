"""Protocols of iBims-1."""

from dataclasses import replace

from finetune.protocols.metrics import GEOMETRY_METRICS, METRICS, SYMMETRIC_GEOMETRY_METRICS
from finetune.protocols.nyu import NYU_BTS
from finetune.protocols.record import Protocol

_IBIMS = Protocol(
    name="ibims-official",
    description="iBims-1 as its authors' scripts (Koch et al. 2018): every pixel with ground truth and a prediction"
    " above 0, no crop, no cap; with planarity (PE), depth boundaries (DBE) and directed errors at 3 m (DDE).",
    tables="tables made with evaluate_ibims.py; DBE of the paper itself comes from other edges",
    source="evaluate_ibims_error_metrics.py of the data set; the copies of it in YiLiM1/DANet and xuefeng-cvr/BS-Net"
    " are alike but for DBE (finetune/scoring/ibims.py says how)",
    data="ibims",
    family="ibims",
    min_depth=1e-3,
    max_depth=50.0,
    valid="positive",
    clip=False,
    metrics=(*METRICS, *GEOMETRY_METRICS),
    expected_images=100,
)

IBIMS = (
    _IBIMS,
    replace(
        _IBIMS,
        name="ibims-official-symmetric",
        description="ibims-official with the depth boundaries of the other version of its script: Canny at 0.15"
        " and 0.3, completeness over true and predicted edges, each distance cut at 10 px.",
        tables="tables made with that version, such as DANet and BS-Net",
        source="the copies of evaluate_ibims_error_metrics.py in YiLiM1/DANet and xuefeng-cvr/BS-Net",
        edges="symmetric",
        metrics=(*METRICS, *SYMMETRIC_GEOMETRY_METRICS),
    ),
    replace(
        NYU_BTS,
        name="ibims-zoedepth",
        description="iBims-1 as ZoeDepth (Bhat et al. 2023): NYU's crop, flip average without a clip before,"
        " 1e-3 < gt < 10 m (its 0 < gt counts one step of a depth file more, 0.8 mm).",
        tables="ZoeDepth, Depth Anything and other zero-shot tables of metric depth",
        source="isl-org/ZoeDepth zoedepth/utils/config.py, zoedepth/utils/misc.py, zoedepth/data/ibims.py",
        data="ibims",
        align_corners=True,
        flip_average=True,
        expected_images=100,
    ),
)
