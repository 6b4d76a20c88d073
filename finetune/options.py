"""The options of all commands around a depth model but training, whose options are in `finetune.config`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from spark.errors import UserError
from spark.options import ExportOptions
from spark.training.option_types import (
    NOT_EMPTY,
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PathText,
    PositiveFloat,
    PositiveInt,
    Side,
    Workers,
    at_most,
    between,
    require,
    values_of,
)

Kind: TypeAlias = Literal[
    "nyu_labeled",
    "densedepth",
    "hub_tars",
    "fastdepth",
    "diw",
    "nyu_pairs",
    "redweb",
    "ibims",
    "kitti",
    "folder",
    "nyu_sync",
]
Space: TypeAlias = Literal["depth", "log_depth", "disparity"]
Fit: TypeAlias = Literal["scale", "scale_shift"]
Format: TypeAlias = Literal["npy", "pfm", "png", "colour", "side", "ply", "mesh"]
Size: TypeAlias = tuple[Side, Side]


# --- data


@dataclass
class PlaceConfig:
    """Data: where the pairs are.

    Attributes:
        root: folder that the lists' entries are relative to, or the file or folder that a layout without lists has.
        list: list of the pairs, a name inside root or a path; null for a layout with splits of its own.
    """

    root: Annotated[PathText, NOT_EMPTY]
    list: PathText | None = None


@dataclass
class ReadingConfig:
    """Data: how the files of a data set are read.

    Attributes:
        kind: layout (docs/use/depth_data.md shows each); null recognises it, and the log says which it was.
        white_border: of the labelled NYU images, which training crops leave out: fill continues the pixels next to it,
            black paints it black as in the published test images, keep leaves it.
        polarity: what the relation > of DIW says of its point A, farther (as its authors' code) or closer.
        depth_scale: metres of one unit of the depth files of a plain folder; null is what a PNG says itself, else
            0.001, and 1 for NPY and PFM.
        bad_depth: NaN, infinite and negative depths are refused, or taken for holes.
    """

    kind: Kind | None = None
    white_border: Literal["keep", "black", "fill"] = "keep"
    polarity: Literal["farther", "closer"] = "farther"
    depth_scale: PositiveFloat | None = None
    bad_depth: Literal["refuse", "hole"] = "refuse"

    def reading(self) -> dict[str, Any]:
        """These options, as keyword arguments of `open_depth_data`."""
        return values_of(self, ReadingConfig)


@dataclass
class EvaluationDataConfig(ReadingConfig, PlaceConfig):
    """Data: the pairs to score on.

    Attributes:
        split: official split, of a layout that has some.
        depth: depth of the labelled file to score against; null is what the protocol stands on.
        workers: processes that read pairs.
    """

    split: Literal["train", "test"] = "test"
    depth: Literal["raw", "filled"] | None = None
    workers: Workers = 0


@dataclass
class PairsConfig(ReadingConfig, PlaceConfig):
    """Data: the pairs to calibrate to.

    Attributes:
        root: folder or file of the pairs (docs/use/depth_data.md); null calibrates to something else.
        split: official split, of a layout that has some.
    """

    root: PathText | None = None
    split: Literal["train", "test"] = "train"


# --- the model


@dataclass(kw_only=True)
class StoredModelConfig:
    """Which depth model.

    Attributes:
        model: folder of a depth model, such as OUTPUT_DIR/model of a training run, or hf-hub:OWNER/NAME.
        encoder_name: package.module:factory of the model's encoder where that is a convnet of your own
            (docs/use/model_options.md), for no file decides which code is run; null for timm's.
    """

    model: PathText
    encoder_name: str | None = None


@dataclass(kw_only=True)
class RunningModelConfig(StoredModelConfig):
    """Which depth model, and where it runs.

    Attributes:
        device: where to compute; auto takes a GPU if there is one.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(kw_only=True)
class PredictingConfig(RunningModelConfig):
    """Which depth model, where it runs, and how it sees images.

    Attributes:
        image_size: size [height, width] in pixels at which the model sees an image; null is the size it was trained
            at. Where an image has other proportions they are kept, and its long side has this size.
        flip_average: average with the prediction of the mirror image.
    """

    image_size: Size | None = None
    flip_average: bool = False


# --- the commands


@dataclass(kw_only=True)
class EvaluationConfig(PredictingConfig, Options):
    """Evaluation: predictions, protocols and outputs. Give one of model, predictions and baseline.

    Attributes:
        output: JSON file for the results.
        predictions: folder of predictions instead, of the whole frames, named after the images as spark-predict does
            (SCENE/rgb_1.npy, .pfm, .png or _mm.png for SCENE/rgb_1.jpg).
        scale: metres of one unit of the files in predictions; null is what a PNG says itself, 0.001 for _mm.png, and 1
            for NPY and PFM.
        holds: what the files in predictions hold, depth or disparity (inverse depth); files named _disparity always
            hold that.
        missing: what to do about images without a prediction, refuse or skip; skipped ones are listed in the results.
        baseline: constant:METRES, or mean, which is the mean of each pixel over training depths.
        baseline_list: list of the training pairs of baseline mean, a name inside data.root or a path; null is the
            training split of the layout.
        protocol: name of the evaluation protocol, several separated by commas, or all, which is all that fit
            (docs/use/protocols.md).
        flip_average: average with the prediction of the mirror image; null is the protocol's own choice.
        threshold: largest difference between the predictions at two points that counts as equally far (metres, or the
            unit of inverse depth of head fusion); it bears on WKDR of the protocols of pairs of points only; null is
            0 for diw and redweb, and chosen on the scored images for nyu-wkdr and nyu-wkdr-sampled.
        batch_size: images of one forward.
        figures: folder for triptychs of input, ground truth and prediction; null draws none.
        triptychs: how many images are drawn, spread evenly over the data; and as many of the worst.
    """

    ESSENTIALS: ClassVar = (
        *("data.root", "output", "model", "predictions", "baseline", "protocol", "data.list", "data.kind"),
        "data.split",
        *("figures", "batch_size", "device", "image_size", "flip_average"),
    )

    data: EvaluationDataConfig
    output: PathText
    model: PathText | None = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    predictions: PathText | None = None
    scale: PositiveFloat | None = None
    holds: Literal["depth", "disparity"] = "depth"
    missing: Literal["refuse", "skip"] = "refuse"
    baseline: str | None = None
    baseline_list: PathText | None = None
    protocol: str = "nyu-bts"
    flip_average: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    threshold: NonNegativeFloat | None = None
    batch_size: BatchSize = 8
    figures: PathText | None = None
    triptychs: PositiveInt = 8

    def check(self) -> None:
        """Refuse options that do not go together."""
        given = [name for name in ("model", "predictions", "baseline") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"give one of --model, --predictions and --baseline, not {' and '.join(given) or 'none of them'}"
            )


@dataclass(kw_only=True)
class PredictConfig(PredictingConfig, Options):
    """Prediction of depth for images and videos.

    Attributes:
        input: an image, a video, a folder (searched recursively), a pattern in quotes ("clips/*.mp4"), a text file with
            one path a line, or the number of a camera (0 is the first).
        output: folder that everything is written to; what an earlier run wrote there under other names stays.
        formats: what to write of each image or frame; npy and pfm are float32 metres, png is 16-bit with its scale in
            the file, colour a picture (for a video a video), side the same beside the image, ply a point cloud, mesh a
            surface (PLY). null is npy, png and colour for images and colour for videos.
        tiles: how many overlapping tiles along the long side, 1 to 16, show the model more detail of large images; they
            are fitted to the prediction for the whole image. 1 is the whole image alone.
        batch_size: images or frames of one forward; images must be equally large, or are taken alone.
        colour_near: depth in metres at the near end of the colours; null is 0 where colour_far is given, and else the
            nearest of each image (its first percentile).
        colour_far: depth in metres at the far end of the colours; null is the farthest that the model says where
            colour_near is given, and else the farthest of each image (its 99th percentile).
        video_range: colours of a video from colour_near to colour_far (fixed; null is 0 and the farthest that the model
            says), or following the frames slowly (smooth,
            the only one for a model without metres).
        frames: most frames of a video or camera; null is all, from a camera until Ctrl-C.
        camera: intrinsics for ply and mesh, a file (JSON or YAML with fx, fy, cx, cy, width, height), nyu, or the field
            of view across in degrees; null is what the image's EXIF says, else an assumption, with a warning.
        png_scale: metres of one unit of the 16-bit PNG; other than 0.001 the file is NAME_depth.png. 65535 units are
            the farthest, 0.00390625 (1/256, as KITTI) reaches 256 m.
        max_pixels: images with more pixels are not read (a damaged or hostile file may claim any number).
    """

    ESSENTIALS: ClassVar = (
        *("formats", "tiles", "image_size", "flip_average", "batch_size", "colour_near", "colour_far"),
        *("camera", "frames", "device"),
    )

    input: PathText
    output: PathText
    formats: Annotated[list[Format], NOT_EMPTY] | None = None
    tiles: Annotated[int, between(1, 16)] = 1
    batch_size: BatchSize = 4
    colour_near: float | None = None
    colour_far: float | None = None
    video_range: Literal["fixed", "smooth"] = "fixed"
    frames: PositiveInt | None = None
    camera: str | None = None
    png_scale: PositiveFloat = 0.001
    max_pixels: PositiveInt = 178_956_970


@dataclass(kw_only=True)
class CalibrateConfig(PredictingConfig, Options):
    """Calibration of a depth model.

    Attributes:
        output: folder for a calibrated copy of the model.
        in_place: put the calibration into the model folder itself instead.
        points: known distances; "x,y,metres; x,y,metres" (x = column, y = row, from 0), or a CSV or JSON file with
            columns x, y, metres, and image where they are of several.
        image: the image that the points lie in, where they do not say.
        pairs: how many pairs, spread evenly over the data.
        camera: the camera to predict for; a file with fx, fy, cx, cy, width, height, nyu, or its field of view across
            in degrees. Depth is multiplied by the ratio of its focal length to that of trained_camera.
        trained_camera: the camera of the images that the model learnt from, likewise.
        space: in which scale and shift apply; null is log_depth, and disparity for a head without metres.
        fit: a factor of depth (scale), or scale and shift (better from five distances); null is scale, and scale_shift
            for a head without metres, which then gives metres.
        outliers: points that contradict the others are refused by name, or kept with less weight (Huber).
        tolerance: relative error after the fit from which a point contradicts the others.
        max_depth: farthest calibrated depth in metres; null lets the model's own be calibrated too.
    """

    ESSENTIALS: ClassVar = (
        *("output", "in_place", "points", "image", "data.root", "data.list", "pairs", "camera"),
        *("trained_camera", "fit", "device"),
    )

    data: PairsConfig
    output: PathText | None = None
    in_place: bool = False
    points: str | None = None
    image: PathText | None = None
    pairs: PositiveInt = 10
    camera: str | None = None
    trained_camera: str = "nyu"
    space: Space | None = None
    fit: Fit | None = None
    outliers: Literal["refuse", "downweight"] = "refuse"
    tolerance: PositiveFloat = 0.5
    max_depth: PositiveFloat | None = None

    def check(self) -> None:
        """Refuse options that do not go together."""
        given = [self.points is not None, self.data.root is not None, self.camera is not None]
        require(sum(given) == 1, "one of points, data.root and camera", sum(given), "given, and one only")
        require(
            (self.output is None) == self.in_place, "output", self.output, "given, or in_place true instead"
        )


@dataclass(kw_only=True)
class ExportDepthConfig(StoredModelConfig, ExportOptions):
    """Export of a depth model, as a graph for other runtimes or as a folder for the Hugging Face hub.

    Attributes:
        resize: of FILE.onnx; fitted brings images of any size to the size that the model was trained at inside, as
            spark-predict does, and depth back to theirs; none lets the network see images as they are, as .pt2 always
            does. null is fitted for .onnx.
        results: results.json files of spark-evaluate on this model, for the model card of a folder; the evaluation.json
            of its run is there anyway.
    """

    ESSENTIALS: ClassVar = (
        *("model", "output", "resize", "size", "results", "license", "datasets", "push_to_hub", "private"),
        "encoder_name",
    )

    resize: Literal["fitted", "none"] | None = None
    results: list[PathText] | None = None

    def check(self) -> None:
        """Refuse options of the other kind of output."""
        super().check()
        if self.is_graph and self.results:
            raise UserError(f"--results is for the card of a folder, and --output is {self.output}")
        if not self.is_graph and self.resize:
            raise UserError(f"--resize is for FILE.onnx, and --output is {self.output}")
        if self.resize == "fitted" and self.output.lower().endswith(".pt2"):
            raise UserError(
                "a .pt2 file cannot resize images of any size: leave --resize out, or write FILE.onnx"
            )


@dataclass(kw_only=True)
class DoctorConfig(ReadingConfig, Options):
    """Examination of a data set of depth.

    Attributes:
        path: folder or file of the data set.
        list: list of the training pairs, for layouts that have lists.
        val_list: list of the pairs to validate on, to compare scenes with.
        samples: how many samples are read.
        output: PNG file for five pairs; null draws none.
    """

    POSITIONAL: ClassVar = "path"

    path: PathText
    list: PathText | None = None
    val_list: PathText | None = None
    samples: PositiveInt = 24
    output: PathText | None = None


@dataclass(kw_only=True)
class CompareConfig(Options):
    """Comparison of results, image by image.

    Attributes:
        results: results.json files of spark-evaluate, two or more; the first is the base.
        protocol: which one to compare, of files with several protocols; null where each has one.
        images: how many of the best and worst images to name.
        output: CSV file for the comparison; null writes none.
    """

    POSITIONAL: ClassVar = "results"

    results: list[PathText]
    protocol: str | None = None
    images: NonNegativeInt = 5
    output: PathText | None = None


@dataclass(kw_only=True)
class AppConfig(RunningModelConfig, Options):
    """Page in the browser that shows the depth of photos.

    Attributes:
        host: address to bind to; 127.0.0.1 is this machine alone.
        host_names: further names that browsers may call the page by. Any but these, host and localhost is refused, so
            that no website can point a name of its own to this machine and read the page (DNS rebinding).
        port: port; null is the first free one from 7860.
        max_pixels: photos with more pixels are not read.
        max_megabytes: largest file taken.
        no_browser: open no browser window.
    """

    RETIRED: ClassVar = ("max_megapixels",)

    host: str = "127.0.0.1"
    host_names: list[str] = field(default_factory=list)
    port: Annotated[PositiveInt, at_most(65_535)] | None = None
    max_pixels: PositiveInt = 178_956_970
    max_megabytes: PositiveFloat = 32.0
    no_browser: bool = False
