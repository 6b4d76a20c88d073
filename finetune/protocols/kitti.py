"""Protocols of KITTI."""

from dataclasses import replace

from finetune.protocols.record import Protocol

_KITTI = Protocol(
    name="kitti-garg-full",
    description="KITTI Eigen split, depth of the benchmark, 1e-3 < gt < 80 m, crop of Garg et al. 2016 on the whole"
    " frame (rows 153:371, columns 44:1197 of 375x1242), as BTS.",
    tables="BTS and NeWCRFs on KITTI",
    source="cleinc/bts pytorch/bts_eval.py (garg_crop, do_kb_crop)",
    data="kitti",
    depth="benchmark",
    min_depth=1e-3,
    max_depth=80.0,
    sees="kb_crop",
    crop_shares=(0.40810811, 0.99189189, 0.03594771, 0.96405229),
    expected_images=652,
)

KITTI = (
    replace(
        _KITTI,
        name="kitti-eigen",
        description="kitti-garg-full with the crop of Eigen et al. 2014 instead, as Godard et al. 2017 wrote it"
        " in shares.",
        tables="Eigen et al. and tables that say Eigen crop",
        source="cleinc/bts pytorch/bts_eval.py (eigen_crop)",
        sees="frame",
        crop_shares=(0.3324324, 0.91351351, 0.0359477, 0.96405229),
    ),
    _KITTI,
    replace(
        _KITTI,
        name="kitti-garg-kb",
        description="The same within the crop of the KITTI benchmark (352x1216, bottom, centre), of which"
        " Garg's crop is rows 143:349, columns 43:1172, flip average, enlarged with align_corners, as ZoeDepth"
        " and AdaBins (which clips each of the two to 1e-3 .. 80 m first).",
        tables="AdaBins and ZoeDepth on KITTI",
        source="shariqfarooq123/AdaBins dataloader.py, evaluate.py; isl-org/ZoeDepth zoedepth/utils/misc.py",
        view=(("bottom_crop", 352, 1216),),
        flip_average=True,
        align_corners=True,
    ),
    replace(
        _KITTI,
        name="kitti-monodepth2",
        description="KITTI Eigen split as Monodepth2 (Godard et al. 2019): projected laser points, 1e-3 < gt <"
        " 80 m, Garg's crop of the whole frame, inverse depth is enlarged, medians of each image made equal.",
        tables="Monodepth2 and other self-supervised depth",
        source="nianticlabs/monodepth2 evaluate_depth.py, export_gt_depth.py, kitti_utils.py",
        depth="laser",
        sees="frame",
        space="disparity",
        alignment="median",
        expected_images=697,
    ),
)
