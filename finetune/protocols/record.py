"""The record of an evaluation protocol: which pixels count, what happens to a prediction first, what is averaged."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from finetune.protocols.metrics import METRICS, PAIR_METRICS
from spark.errors import UserError

PROSE = ("description", "tables", "source", "expected_images")
"""Fields that change no score, and so not the hash of a record."""
KB_SIZE = (352, 1216)
"""(H, W) of the frames of the test set of KITTI's depth benchmark [px]."""


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
            NYU's labelled file, chosen when it is opened; "benchmark" (maps of KITTI's depth benchmark) and "laser"
            (projected scans) follow from the list of frames.
        min_depth: lower end of the depths that count [m].
        max_depth: upper end of the depths that count [m].
        valid: which ground truth counts. "strict": min_depth < g < max_depth; "closed": min_depth <= g <= max_depth;
            "positive": g > 0.
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
            are truncated; None: see `crop`.
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
        metrics: names of the metrics by which models can be compared (`finetune.protocols.metrics.METRIC`).
        expected_images: how many images the official list has; results state it beside the number that was
            scored.
        threshold: of pairs of points, largest predicted difference that counts as equally far (in
            metres, or in the unit of inverse depth of a head without metres); 0 lets protocols with `thresholds` among
            their options choose it (`finetune.scoring.pairwise`).
        edges: of iBims-1, which version of its script finds depth boundaries and measures them
        (`finetune.scoring.ibims`):
            "directed" (dbe_com) or "symmetric" (dbe_com_sym).
        options: further settings that one evaluator alone reads, as (name, value) pairs.
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
        for field, kind in get_type_hints(Protocol).items():
            known, value = get_args(kind), getattr(self, field)
            if get_origin(kind) is Literal and value not in known:
                listed = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
                raise UserError(f"{self.name}: {field} is {listed}, not {value!r}")
        for step, *_ in self.view:
            if step not in ("resize", "centre_crop", "bottom_crop"):
                raise UserError(f"{self.name}: a view has no step {step!r}")
        if self.view and self.scale_crop:
            raise UserError(f"{self.name}: the crop of a view is not scaled")
        if self.alignment == "disparity" and self.space != "disparity":
            raise UserError(f"{self.name}: alignment 'disparity' needs space 'disparity'")

    @property
    def scores_pairs(self) -> bool:
        """Whether it scores the order of pairs of points."""
        return not set(PAIR_METRICS).isdisjoint(self.metrics)

    def option(self, name: str, default: float = 0) -> float:
        """The value of an option as a number."""
        return float(dict(self.options).get(name, default))

    def seen_at(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the part of an image of (H, W) `size` that a model is shown."""
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
        """(top, bottom, left, right) of the pixels that count, in the view of ground truth of (H, W) `size`."""
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
        """Every field, as in JSON."""
        return json.loads(json.dumps(asdict(self)))

    def hash(self) -> str:
        """SHA-256 of the canonical JSON of the fields that change scores and are not at their defaults.

        A field that is added later leaves the hash of older results as it was.
        """
        default = Protocol(self.name, "", self.min_depth, self.max_depth).record()
        always = ("name", "min_depth", "max_depth")
        relevant = {
            key: value
            for key, value in self.record().items()
            if key not in PROSE and (key in always or value != default[key])
        }
        text = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
