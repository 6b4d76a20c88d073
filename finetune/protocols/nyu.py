"""Protocols of NYU Depth V2."""

from dataclasses import replace

from finetune.protocols.record import Protocol

NYU_BTS = Protocol(
    name="nyu-bts",
    description="NYU Depth V2 as BTS (Lee et al. 2019): raw depth, 1e-3 < gt < 10 m, crop 45:471, 41:601.",
    tables="BTS, NeWCRFs, and most NYU tables since",
    source="cleinc/bts pytorch/bts_eval.py",
    data="nyu",
    min_depth=1e-3,
    max_depth=10.0,
    crop=(45, 471, 41, 601),
    frame=(480, 640),
    expected_images=654,
)

_NYU_FILLED = replace(
    NYU_BTS,
    depth="filled",
    valid="positive",
    crop=None,
    aggregation="pooled",
)

NYU = (
    NYU_BTS,
    replace(
        NYU_BTS,
        name="nyu-adabins",
        description="nyu-bts as AdaBins (Bhat et al. 2021): flip average of predictions that are clipped each,"
        " then enlarged with align_corners.",
        tables="AdaBins",
        source="shariqfarooq123/AdaBins evaluate.py",
        flip_average=True,
        clip_before_average=True,
        align_corners=True,
    ),
    replace(
        NYU_BTS,
        name="nyu-zoedepth",
        description="nyu-bts as ZoeDepth (Bhat et al. 2023): flip average, no clip before it, enlarged with"
        " align_corners.",
        tables="ZoeDepth, Depth Anything with metric heads",
        source="isl-org/ZoeDepth evaluate.py, zoedepth/utils/misc.py",
        flip_average=True,
        align_corners=True,
    ),
    replace(
        NYU_BTS,
        name="nyu-dinov3-linear",
        description="nyu-bts as DINOv3 (Siméoni et al. 2025) scores linear heads on frozen encoders: flip average, not"
        " clipped before it.",
        tables="DINOv3",
        source="facebookresearch/dinov3 dinov3/eval/depth/eval.py, dinov3/eval/depth/configs/config-nyu.yaml",
        flip_average=True,
    ),
    replace(
        NYU_BTS,
        name="nyu-dorn",
        description="nyu-bts with the crop of DORN (Fu et al. 2018): rows 21:460, columns 25:616, counted from"
        " 1.",
        tables="DORN",
        source="none of its own: README.md of hufu6371/DORN says that it crops as Eigen et al., which is "
        "DenseDepth's crop too",
        crop=(20, 460, 24, 616),
    ),
    replace(
        _NYU_FILLED,
        name="nyu-densedepth",
        description="NYU Depth V2 as DenseDepth (Alhashim and Wonka 2018): filled depth without a cap, crop"
        " 20:460, 24:616, flip average of predictions clipped to 0.1 .. 10 m each, pixels pooled (its own"
        " AbsRel divides by the prediction; here as everywhere by the ground truth).",
        tables="DenseDepth",
        source="ialhashim/DenseDepth utils.py, whose crop is in eigen_test_crop.npy",
        crop=(20, 460, 24, 616),
        min_depth=0.1,
        flip_average=True,
        clip_before_average=True,
    ),
    replace(
        _NYU_FILLED,
        name="nyu-laina",
        description="NYU Depth V2 as Laina et al. 2016: filled depth without a cap, no crop, no clip, pixels"
        " pooled.",
        tables="Laina et al. (FCRN)",
        source="iro-cp/FCRN-DepthPrediction matlab/evaluateNYU.m, matlab/error_metrics.m",
        clip=False,
    ),
    replace(
        _NYU_FILLED,
        name="nyu-fastdepth",
        description="NYU Depth V2 as FastDepth (Wofk et al. 2019): filled depth, reduced to 250x333, of that"
        " the middle 228x304, scored at 224x224 (nearest neighbours); no cap, no clip, mean over images.",
        tables="FastDepth",
        source="dwofk/fast-depth dataloaders/nyu.py, dataloaders/transforms.py, metrics.py",
        view=(("resize", 250, 333), ("centre_crop", 228, 304), ("resize", 224, 224)),
        clip=False,
        aggregation="per_image",
    ),
    replace(
        NYU_BTS,
        name="nyu-marigold",
        description="nyu-bts as Marigold (Ke et al. 2024): scale and shift of each image fitted to depth by"
        " least squares, then clipped.",
        tables="Marigold, GeoWizard and other affine-invariant depth",
        source="prs-eth/Marigold script/depth/eval.py, src/util/alignment.py, src/dataset/nyu_dataset.py",
        alignment="depth",
    ),
    replace(
        NYU_BTS,
        name="nyu-bts-scaled",
        description="nyu-bts with its crop scaled to any size: not to be compared with publications.",
        tables="",
        source="",
        data="any",
        scale_crop=True,
        expected_images=None,
    ),
    replace(
        NYU_BTS,
        name="nyu-affine",
        description="nyu-bts for relative depth: scale and shift of each image fitted in inverse depth,"
        " crop scaled to any size.",
        tables="",
        source="",
        data="any",
        scale_crop=True,
        expected_images=None,
        space="disparity",
        alignment="disparity",
    ),
)
