"""Named evaluation protocols: which pixels count, what happens to a prediction first, and what is averaged.

Numbers of two protocols cannot be compared: on NYU the crop, the cap, flip averaging and pooling each move
RMSE by more than separates published models. So a protocol is data with a name: one record, from which results take
every setting and a hash, and docs/protocols.md its table. Nothing is adapted on the quiet: ground truth of another
size, for instance, is an error unless the protocol scales its crop. How records act on arrays is said by their family,
see `finetune.scoring.evaluators`; of maps of depth it is `finetune.scoring.depth`.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from finetune.scoring.metrics import (
    GEOMETRY_METRICS,
    METRICS,
    ORDINAL_METRICS,
    SYMMETRIC_GEOMETRY_METRICS,
    WKDR_METRICS,
)
from spark.errors import UserError

PROSE = ("description", "tables", "source", "expected_images")
"""Fields that bear on no number, and so not on the hash of a record."""
CHOICES = {
    "supervision": ("metric", "affine", "ordinal"),
    "depth": ("raw", "filled", "benchmark", "laser"),
    "valid": ("strict", "closed", "positive"),
    "sees": ("frame", "inside_border", "kb_crop"),
    "space": ("depth", "disparity"),
    "alignment": ("none", "median", "depth", "disparity", "log_depth"),
    "aggregation": ("per_image", "pooled"),
    "edges": ("directed", "symmetric"),
}
"""Values of the fields that are one of a few words."""
KB_SIZE = (352, 1216)
"""Of the frames of the test set of KITTI's depth benchmark."""


@dataclass(frozen=True)
class Protocol:
    """How predictions are compared with ground truth. Of maps of depth (family "depth"), in this order:

    1. The prediction is brought to the `space` of the protocol: depth, or inverse depth.
    2. With `flip_average`, the predictions of the image and of its mirror image are averaged
       (`merge_flipped`), each clipped first if `clip_before_average`.
    3. NaN and -inf in a prediction become `min_depth`, +inf becomes `max_depth`, and they are counted. The
       values are those that the BTS code ends up with; the replacement comes before the resize so that one
       bad pixel does not spread. NaN thereby scores about as badly as a depth can (1 mm), never dropped.
       In the space of inverse depth they become the farthest of the other values, and so do depths of 0 or less.
       A prediction without any usable value is `min_depth` everywhere, and nothing is aligned: a fit would make
       the best constant of it, out of the ground truth alone. Results list such images (`unusable`).
    4. Bilinear resize to the size of the ground truth, if it differs.
    5. The `view` is taken of both.
    6. Pixels of ground truth that are `valid` and inside the crop count.
    7. `alignment`, fitted over those, then clipped to [min_depth, max_depth] if `clip`.
    8. Metrics per image and their mean over images, or over all pixels pooled.

    Args:
        name: what results call it.
        description: one sentence with the source.
        tables: which published numbers stand on it; "" for none.
        source: the public code that its constants were compared with, REPOSITORY FILE; "" for none.
        data: the data set that it is of: "nyu", "kitti", ...; "any" for protocols that any data with such ground truth
            can be scored under.
        family: which evaluator acts on the record (`finetune.scoring.evaluators.EVALUATORS`).
        supervision: what the ground truth is. "metric": maps in metres. "affine": disparity up to scale and shift.
            "ordinal": pairs of points.
        depth: the kind of ground truth that published numbers of this protocol stand on. "raw" and "filled" are of
            NYU's labelled file, whoever opens it chooses; "benchmark" (maps of KITTI's depth benchmark) and "laser"
            (projected scans) are as the list of frames says.
        min_depth: lower end of the depths that count [m].
        max_depth: upper end of the depths that count [m].
        valid: which ground truth counts. "strict": min_depth < g < max_depth; "closed": min_depth <= g <= max_depth;
            "positive": g > 0, whatever its size.
        sees: what of the image a model is shown; its prediction is continued over the rest of the frame by its edge.
            "frame": all of it. "inside_border": without the `border` px of `options` around it. "kb_crop": 352x1216 at
            the bottom, centred, as on KITTI.
        view: what is taken of the frame, in order: ("resize", H, W) by nearest neighbours, ("centre_crop", H, W),
            ("bottom_crop", H, W), which is centred horizontally.
        crop: (top, bottom, left, right) of the pixels that count, half open, in a frame of `frame`, or in its view;
            None: all of them.
        frame: (H, W) of the ground truth that the crop is given for; None: any size.
        scale_crop: accept ground truth of another size than `frame`, with the crop scaled in proportion and
            rounded; without a view.
        crop_shares: (top, bottom, left, right) of the pixels that count as shares of height and width, whose products
            are truncated; None: `crop` says it.
        space: what is averaged over flips and resized, "depth" or its inverse, "disparity".
        align_corners: of the bilinear resize: whether the centres of the corner pixels (True) or the outer
            edges of the image (False) coincide.
        flip_average: whether the prediction is averaged with that of the mirror image.
        clip_before_average: clip both predictions to [min_depth, max_depth] before they are averaged.
        alignment: what is fitted to the ground truth of each image, over the pixels that count
            (`finetune.scoring.alignment`). "none": predictions are metres. "median": one factor, by the medians.
            "depth",
            "disparity", "log_depth": scale and shift by least squares there. The ground truth helps the prediction:
            such numbers say what a model knows of shape, and do not stand beside metric ones.
        clip: clip what was aligned to [min_depth, max_depth]. Without it only values that have no logarithm are raised
            to min_depth.
        aggregation: "per_image": mean over images of each image's metric; "pooled": one metric over all
            pixels, or all pairs.
        metrics: names of the metrics by which models can be compared (`finetune.scoring.metrics.METRIC`).
        expected_images: how many images the official list has; results state it beside the number that was
            scored.
        threshold: of relations, largest difference at which a prediction says that two points are equally far (in
            metres, or in the unit of inverse depth of a head without metres); 0 lets protocols with `thresholds` among
            their options choose it (`finetune.scoring.pairwise`).
        edges: of iBims-1, which version of its script finds depth boundaries and measures them
        (`finetune.scoring.ibims`):
            "directed" (dbe_com) or "symmetric" (dbe_com_sym).
        options: further settings that one family alone reads, as (name, value) pairs.

    Raises:
        ValueError: fields that contradict each other.
    """

    name: str
    description: str
    min_depth: float
    max_depth: float
    tables: str = ""
    source: str = ""
    data: str = "any"
    family: str = "depth"
    supervision: Literal["metric", "affine", "ordinal"] = "metric"
    depth: Literal["raw", "filled", "benchmark", "laser"] = "raw"
    valid: Literal["strict", "closed", "positive"] = "strict"
    sees: Literal["frame", "inside_border", "kb_crop"] = "frame"
    view: tuple[tuple[str, int, int], ...] = ()
    crop: tuple[int, int, int, int] | None = None
    frame: tuple[int, int] | None = None
    scale_crop: bool = False
    crop_shares: tuple[float, float, float, float] | None = None
    space: Literal["depth", "disparity"] = "depth"
    align_corners: bool = False
    flip_average: bool = False
    clip_before_average: bool = False
    alignment: Literal["none", "median", "depth", "disparity", "log_depth"] = "none"
    clip: bool = True
    aggregation: Literal["per_image", "pooled"] = "per_image"
    metrics: tuple[str, ...] = METRICS
    expected_images: int | None = None
    threshold: float = 0.0
    edges: Literal["directed", "symmetric"] = "directed"
    options: tuple[tuple[str, float | int | str], ...] = ()

    def __post_init__(self):
        if not self.threshold >= 0:
            raise UserError(f"{self.name}: threshold must be 0 or more, not {self.threshold}")
        if not 0 < self.min_depth < self.max_depth:
            raise UserError(f"{self.name}: depths must satisfy 0 < min_depth < max_depth")
        if self.crop is not None and self.frame is None:
            raise UserError(f"{self.name}: a crop needs the frame that its pixels are counted in")
        if self.crop is not None and self.crop_shares is not None:
            raise UserError(f"{self.name}: a crop is given in pixels or in shares, not in both")
        for field, known in CHOICES.items():
            if (value := getattr(self, field)) not in known:
                listed = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
                raise UserError(f"{self.name}: {field} is {listed}, not {value!r}")
        for step, *_ in self.view:
            if step not in ("resize", "centre_crop", "bottom_crop"):
                raise UserError(f"{self.name}: a view has no step {step!r}")
        if self.view and self.scale_crop:
            raise UserError(f"{self.name}: the crop of a view is not scaled")
        if self.alignment == "disparity" and self.space != "disparity":
            raise UserError(f"{self.name}: alignment 'disparity' needs space 'disparity'")

    def option(self, name: str, default: float = 0) -> float:
        """A number among `options`."""
        return float(dict(self.options).get(name, default))

    def seen_at(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the part of an image of (H, W) `size` that a model is shown.

        Raises:
            ValueError: the image is too small.
        """
        height, width = size
        top, bottom, left, right = 0, height, 0, width
        if self.sees == "kb_crop":
            top, left = height - KB_SIZE[0], (width - KB_SIZE[1]) // 2
            bottom, right = height, left + KB_SIZE[1]
        elif self.sees == "inside_border":
            # Pixels `border` to side - `border`, counted from 1, both included (Chen et al. 2016).
            border = int(self.option("border"))
            top, bottom, left, right = border - 1, height - border, border - 1, width - border
        if top < 0 or left < 0 or bottom <= top or right <= left:
            raise UserError(
                f"protocol {self.name} shows a model less than the whole image, and one of {height}x{width} is too"
                " small for that: use images at their native size"
            )
        return top, bottom, left, right

    def crop_at(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the pixels that count, in the view of ground truth of (H, W) `size`.

        Raises:
            ValueError: another size than `frame`, and the protocol does not scale its crop.
        """
        height, width = size
        if self.frame is not None and tuple(size) != self.frame and not self.scale_crop:
            raise UserError(
                f"protocol {self.name} is defined on ground truth of {self.frame[0]}x{self.frame[1]}, this is"
                f" {height}x{width}: use ground truth at its native size, or a protocol that scales its crop"
                " (such as nyu-bts-scaled), whose numbers must not stand beside published ones"
            )
        if self.view:
            _, height, width = self.view[-1]
        if self.crop_shares is not None:
            top, bottom, left, right = self.crop_shares
            return int(top * height), int(bottom * height), int(left * width), int(right * width)
        if self.crop is None or self.frame is None:
            return 0, height, 0, width
        top, bottom, left, right = self.crop
        if not self.scale_crop:
            return self.crop
        vertical, horizontal = height / self.frame[0], width / self.frame[1]
        return (
            round(top * vertical),
            round(bottom * vertical),
            round(left * horizontal),
            round(right * horizontal),
        )

    def record(self) -> dict[str, Any]:
        """Every field, as JSON has it."""
        return json.loads(json.dumps(asdict(self)))

    def hash(self) -> str:
        """SHA-256 of what bears on numbers: canonical JSON of the fields other than `PROSE` that are not at their
        defaults, so that a field added later leaves the hash of older results as it was."""
        default = Protocol(self.name, "", self.min_depth, self.max_depth).record()
        always = ("name", "min_depth", "max_depth")
        bears = {
            key: value
            for key, value in self.record().items()
            if key not in PROSE and (key in always or value != default[key])
        }
        text = json.dumps(bears, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_NYU_BTS = Protocol(
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
    _NYU_BTS,
    depth="filled",
    valid="positive",
    crop=None,
    min_depth=1e-3,
    max_depth=10.0,
    aggregation="pooled",
)

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

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            _NYU_BTS,
            replace(
                _NYU_BTS,
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
                _NYU_BTS,
                name="nyu-zoedepth",
                description="nyu-bts as ZoeDepth (Bhat et al. 2023): flip average, no clip before it, enlarged with"
                " align_corners.",
                tables="ZoeDepth, Depth Anything with metric heads",
                source="isl-org/ZoeDepth evaluate.py, zoedepth/utils/misc.py",
                flip_average=True,
                align_corners=True,
            ),
            replace(
                _NYU_BTS,
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
                _NYU_BTS,
                name="nyu-marigold",
                description="nyu-bts as Marigold (Ke et al. 2024): scale and shift of each image fitted to depth by"
                " least squares, then clipped.",
                tables="Marigold, GeoWizard and other affine-invariant depth",
                source="prs-eth/Marigold script/depth/eval.py, src/util/alignment.py, src/dataset/nyu_dataset.py",
                alignment="depth",
            ),
            replace(
                _NYU_BTS,
                name="nyu-bts-scaled",
                description="nyu-bts with its crop scaled to any size: not to be compared with publications.",
                tables="",
                source="",
                data="any",
                scale_crop=True,
                expected_images=None,
            ),
            replace(
                _NYU_BTS,
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
                _NYU_BTS,
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
        raise UserError(f"no evaluation protocol {name!r}: {hint}known: {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if threshold is not None:
        if protocol.family != "relations":
            relations = ", ".join(key for key, each in PROTOCOLS.items() if each.family == "relations")
            raise UserError(f"threshold is for relations of points ({relations}), not {name}: leave it out")
        protocol = replace(protocol, threshold=threshold)
    return protocol if flip_average is None else replace(protocol, flip_average=flip_average)
