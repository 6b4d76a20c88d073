"""The options of training from an encoder: the only list of them; types check values, docstrings are the ``--help``."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from finetune.heads import HEADS
from finetune.losses import LOSSES
from finetune.options import Kind, PlaceConfig, ReadingConfig, Size
from spark.model.names import is_own
from spark.training.option_types import (
    LOW_FIRST,
    BatchSize,
    InnerShare,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Rate,
    Rule,
    Share,
    ShareBelow1,
    Workers,
    at_most,
    require,
)
from spark.training.options import Epochs, OptimizerConfig, RunConfig

HeadName = Annotated[str, Rule(f"one of {', '.join(HEADS)}", lambda name: name in HEADS, names=True)]
LossWeights = Annotated[dict[str, float], Rule(f"of {', '.join(LOSSES)}", lambda weights: True)]
Factor = Annotated[PositiveFloat, at_most(1000)]
Range = Annotated[tuple[Factor, Factor], LOW_FIRST]


@dataclass
class DepthModelConfig:
    """Model: head and depth range.

    Attributes:
        head: what turns the encoder's features into depth; docs/use/depth.md says what each is and gives.
        head_options: arguments of that head, such as decoder_channels of unetpp.
        init: folder of a depth model, such as OUTPUT_DIR/model of a run, whose weights this one starts from: all with
            the same head, encoder and core from head fusion to metric_bins; null starts the head from random weights.
        min_depth: nearest depth in metres that the model can say.
        max_depth: farthest depth in metres that the model can say; readings beyond it do not train it.
        initial_depth: depth in metres near which an untrained head starts; the median of NYU is 2.7.
        drop_path: stochastic depth rate of the encoder.
        encoder_options: further arguments of timm.create_model for the encoder (of the factory of your own), such as
            zero_init_last of a ResNet, which false makes all residual branches count from the start.

    """

    head: HeadName = "unetpp"
    head_options: dict[str, Any] = field(default_factory=dict)
    init: PathText | None = None
    min_depth: float = 1e-3
    max_depth: float = 10.0
    initial_depth: float = 2.7
    drop_path: ShareBelow1 = 0.0
    encoder_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DepthSetConfig(ReadingConfig, PlaceConfig):
    """One data set: where it lies, its layout, and how it is read; docs/use/depth_data.md shows every layout.

    Attributes:
        depth: which depth of the labelled file trains, raw (with holes) or filled; other layouts have what their files
            hold.
        labels: classes of each pixel that are read along, 13 or 40; null reads none.
        void: pixels without a class are ignored, or are a class of their own behind the others.
        weight: share of the micro-batches, relative to that of the other sets.

    """

    depth: Literal["raw", "filled"] = "raw"
    labels: Literal[13, 40] | None = None
    void: Literal["ignore", "class"] = "ignore"
    weight: PositiveFloat = 1.0

    def reading(self) -> dict[str, Any]:
        """How files are read, as keyword arguments of `open_depth_data`."""
        from finetune.depth_data.labels import LabelOptions

        labels = None if self.labels is None else LabelOptions(self.labels, self.void)
        return {**super().reading(), "depth": self.depth, "labels": labels}


@dataclass
class ViewConfig:
    """Data: sizes and augmentation of the images to train on.

    Attributes:
        image_size: size [height, width] in pixels at which a whole frame is presented to the model.
        crop_size: size [height, width] of the random crop of it that one training sample is.
        border: part [top, bottom, left, right] of a 480x640 frame that crops are taken from; null is all of it. Further
            sets are used whole.
        zoom: range of the random magnification s, which divides depth by s.
        flip: probability of a horizontal flip.
        rotation: largest random rotation in degrees.
        colour: probability that gamma, brightness and channels change.
        gamma: range of the exponent of colours.
        brightness: range of the factor on all channels.
        channel: range of the factor on each channel.
        contrast: range of the factor on the difference from the mean colour.
        mean: mean of every channel on the scale 0 to 1; null takes what the encoder was trained with.
        std: standard deviation of every channel on the scale 0 to 1; null takes what the encoder was trained with.
    """

    image_size: Size = (480, 640)
    crop_size: Size = (416, 544)
    border: tuple[int, int, int, int] | None = (45, 472, 43, 608)
    zoom: Range = (1.0, 1.5)
    flip: Share = 0.5
    rotation: Annotated[NonNegativeFloat, at_most(180)] = 0.0
    colour: Share = 0.5
    gamma: Range = (0.9, 1.1)
    brightness: Range = (0.75, 1.25)
    channel: Range = (0.9, 1.1)
    contrast: Range = (1.0, 1.0)
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None


@dataclass
class AugmentationConfig(ViewConfig):
    """Data: sizes and augmentation of the pairs to train on.

    Attributes:
        cut_depth: probability that a rectangle of the image shows its depth (CutDepth).
    """

    cut_depth: Share = 0.0


@dataclass
class DepthDataConfig(AugmentationConfig, DepthSetConfig):
    """Data: the pairs to train and to validate on, their sizes and their augmentation.

    Attributes:
        val_root: where the pairs to validate on lie; null is root.
        val_kind: layout of val_root; null is kind, or with val_root recognises it.
        val_list: list of the pairs to validate on; null validates on the test split of a layout that has one, and on
            nothing where a list names the training pairs.
        sets: further sets to train on in the same run, a list of {root, kind, list, weight, ...}.
        workers: processes that read pairs; null is one for each core that a process may use, at most 8.
        max_unreadable: share of the pairs that may be unreadable before the run stops, between 0 and 1.
        max_empty: share of the run's micro-batches that may be without a single reading before the run stops.

    """

    val_root: PathText | None = None
    val_kind: Kind | None = None
    val_list: PathText | None = None
    sets: list[DepthSetConfig] = field(default_factory=list)
    workers: Workers | None = None
    max_unreadable: Share = 0.01
    max_empty: Share = 0.01


@dataclass
class TuningOptimConfig(OptimizerConfig):
    """Optimizer and schedule.

    Attributes:
        lr: peak learning rate of the head, for the batch size at hand (it is not scaled with it).
        betas: decay rates of the optimizer's running moments.
        schedule: cosine is a linear warm-up and half a cosine down; onecycle is half a cosine up and another one down.
        rise: share of the run in which the learning rate rises (onecycle).
        momentum: first of betas, or SGD's momentum, where the learning rate is at its peak and where it is lowest
            (onecycle), such as [0.85, 0.95]; null keeps betas.
        start_factor: learning rate at the first step as a share of the peak.
        end_factor: learning rate at the last step as a share of the peak.
        encoder_lr_factor: factor on the learning rate of the encoder.
        layer_decay: factor from one layer of the encoder to the next shallower one; null is none.
        frozen_epochs: epochs at the start in which the encoder does not learn and its batch statistics stay.
        ema_decay: keep an exponential moving average of the weights, which each step leaves at this share, such as
            0.999; validations, model/ and best/ are then of the average. null keeps none.

    """

    name: Literal["lamb", "adamw", "sgd"] = "adamw"
    lr: Rate = 1e-4
    batch_size: BatchSize = 32
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)  # pyright: ignore[reportIncompatibleVariableOverride]
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    schedule: Literal["cosine", "onecycle"] = "cosine"
    warmup_epochs: NonNegativeFloat = 1.0
    rise: Share = 0.3
    momentum: tuple[InnerShare, InnerShare] | None = None
    start_factor: Share = 0.01
    end_factor: Share = 0.01
    clip_grad: PositiveFloat | None = 1.0
    encoder_lr_factor: PositiveFloat = 1.0
    layer_decay: PositiveShare | None = None
    frozen_epochs: NonNegativeFloat = 0.0

    def check(self) -> None:
        """Refuse options that do not go together."""
        require(
            self.momentum is None or self.schedule == "onecycle",
            "optim.momentum",
            self.momentum,
            "null without optim.schedule onecycle",
        )


@dataclass(kw_only=True)
class TuningConfig(RunConfig):
    """Run: encoder, length, precision, logs and checkpoints.

    Attributes:
        encoder: exported encoder folder, a .pth file, a timm model name, or package.module:factory of a convnet of your
            own (docs/use/model_options.md).
        encoder_name: timm name of the encoder in a .pth file that does not say it, or package.module:factory of a
            convnet of your own in a file or folder, for no file decides which code is run; null asks the file.
        pretrained: for a timm name, load timm's published weights (true) or start from random ones (false); a folder
            or file brings its own weights.
        sync_bn: batch normalisation takes its statistics over all processes (on CPU each process takes its own).
        validate_every: epochs between validations; 0 validates at the end only. The last one is always made.
        patience: validations in a row without a better one after which the run ends; null never ends it early.
    """

    encoder: PathText
    encoder_name: str | None = None
    pretrained: bool = False
    optim: TuningOptimConfig = field(default_factory=TuningOptimConfig)
    epochs: Epochs = 15
    sync_bn: bool = True
    checkpoint_every: NonNegativeInt = 500
    validate_every: NonNegativeFloat = 1
    patience: PositiveInt | None = None

    def own_encoder(self) -> str | None:
        """package.module:factory of one's own encoder, as the options name it; None for timm's."""
        return next((name for name in (self.encoder, self.encoder_name) if name and is_own(name)), None)


@dataclass(kw_only=True)
class DepthConfig(TuningConfig):
    """Run: encoder, losses, length, precision, logs and checkpoints.

    Attributes:
        losses: name and weight of each loss in the sum; docs/use/depth.md says what each scores and needs.
        loss_options: arguments of each of these losses, by its name, such as variance_focus of silog.
        protocol: evaluation protocol of the validation and of evaluation.json.
        flip_average: the evaluation averages with the mirror image's prediction; null is the protocol's own choice.
        select: metric by which a validation is better than another (of protocol diw: whdr, accuracy or wkdr); the model
            of the best one is in output_dir/best, that of the last step in output_dir/model.
        triptychs: number of validation images that every validation draws into figures/.
    """

    CARDS: ClassVar = "depth"
    ESSENTIALS: ClassVar = (
        *("encoder", "data.root", "output_dir", "pretrained", "data.list", "data.val_list", "data.kind"),
        *("model.head", "model.max_depth", "losses", "optim.lr", "optim.batch_size", "epochs", "max_steps"),
        *("precision", "accumulation", "protocol", "resume"),
    )
    RETIRED: ClassVar = ("data.cache",)

    data: DepthDataConfig
    model: DepthModelConfig = field(default_factory=DepthModelConfig)
    losses: LossWeights = field(default_factory=lambda: {"silog": 1.0})
    loss_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocol: str = "nyu-bts"
    flip_average: bool | None = None
    select: Literal[
        "delta1",
        "delta2",
        "delta3",
        "abs_rel",
        "sq_rel",
        "rmse",
        "rmse_log",
        "log10",
        "silog",
        "whdr",
        "accuracy",
        "wkdr",
    ] = "abs_rel"
    triptychs: NonNegativeInt = 4

    def check(self) -> None:
        """Refuse a metric that the protocol does not have."""
        from finetune.protocols import PROTOCOLS

        if self.protocol in PROTOCOLS:  # an unknown name is refused by its reader
            known = PROTOCOLS[self.protocol].metrics
            wanted = f"a metric of protocol {self.protocol}: {', '.join(known)}"
            require(self.select in known, "select", self.select, wanted)


@dataclass
class ClassifyDataConfig:
    """Data: labelled photos, and their augmentation.

    Attributes:
        root: folder with train/CLASS/* and val/CLASS/*.
        labels: share of the training photos of each class that is trained on; at least one photo of each is. A smaller
            share is part of a larger one.
        labels_seed: another seed, another choice of these photos.
        size: side of the squares that the encoder sees in pixels.
        crop_scale: smallest and largest share of a photo's area that a random crop covers in training.
        hflip: probability of a horizontal flip in training.
        workers: processes that read photos; null is one for each core that a process may use, at most 8.
        max_unreadable: share of the photos that may be unreadable before the run stops.

    """

    root: PathText
    labels: PositiveShare = 1.0
    labels_seed: int = 0
    size: Annotated[PositiveInt, at_most(65536)] = 224
    crop_scale: Annotated[tuple[PositiveShare, PositiveShare], LOW_FIRST] = (0.35, 1.0)
    hflip: Share = 0.5
    workers: Workers | None = None
    max_unreadable: Share = 0.01


@dataclass
class ClassifyOptimConfig(TuningOptimConfig):
    """Optimizer and schedule.

    Attributes:
        lr: peak learning rate of the classifier, for the batch size at hand (it is not scaled with it).
    """

    lr: Rate = 1e-3
    batch_size: BatchSize = 64


@dataclass(kw_only=True)
class ClassifyConfig(TuningConfig):
    """Run: encoder, length, precision, logs and checkpoints.

    Attributes:
        linear: train only a linear layer on the pooled features of the frozen encoder.
        drop_path: stochastic depth rate of the encoder.
        smoothing: share of the target that is spread over all classes (label smoothing).
        encoder_options: further arguments of timm.create_model for the encoder.
    """

    CARDS: ClassVar = "classify"
    ESSENTIALS: ClassVar = (
        *("encoder", "data.root", "output_dir", "pretrained", "linear", "data.labels", "data.size"),
        *("optim.lr", "optim.batch_size", "epochs", "precision", "resume"),
    )

    data: ClassifyDataConfig
    optim: ClassifyOptimConfig = field(default_factory=ClassifyOptimConfig)
    linear: bool = False
    drop_path: ShareBelow1 = 0.0
    smoothing: ShareBelow1 = 0.0
    encoder_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class SegmentDataConfig(ViewConfig, PlaceConfig):
    """Data: images with a class in each pixel, and their augmentation.

    Attributes:
        root: folder with images/ and masks/, in train/ and val/ or with lists; or NYU Depth V2, its sync folders (with
            a list) or its labelled file.
        list: list of the images to train on, a name inside root or a path; null for a layout with splits of its own.
        val_list: list of the images to validate on; null validates on the other split of a layout that has one, and on
            nothing where a list names the training images.
        kind: layout, masks (images/ and masks/), nyu_sync or nyu_labeled; null recognises it.
        classes: number of classes, or their names in the order of their numbers; of NYU 13 or 40. Masks count them from
            0, and 255 is void.
        white_border: of the labelled NYU images: fill continues the pixels next to it, black paints it black, keep
            leaves it.
        border: part [top, bottom, left, right] of a 480x640 frame that crops are taken from; null is all of it.
        workers: processes that read images; null is one for each core that a process may use, at most 8.
        max_unreadable: share of the images that may be unreadable before the run stops, between 0 and 1.
    """

    val_list: PathText | None = None
    kind: Literal["masks", "nyu_sync", "nyu_labeled"] | None = None
    classes: Annotated[int, Rule("from 2 to 255", lambda value: 2 <= value <= 255)] | list[str] = 13
    white_border: Literal["keep", "black", "fill"] = "keep"
    border: tuple[int, int, int, int] | None = None
    workers: Workers | None = None
    max_unreadable: Share = 0.01

    def check(self) -> None:
        """Refuse names that are no classes."""
        if isinstance(self.classes, list):
            different = 2 <= len(set(self.classes)) == len(self.classes) <= 255
            require(different, "data.classes", self.classes, "2 to 255 different names, or their number")


@dataclass(kw_only=True)
class SegmentConfig(TuningConfig):
    """Run: encoder, decoder, length, precision, logs and checkpoints.

    Attributes:
        decoder: decoder of segmentation_models_pytorch; unetpp and unet take any pyramid, fpn maps at four strides.
        decoder_channels: width of unetpp and unet at each resolution, from half the deepest stride up to stride 1; null
            is 256 down to 16.
        frozen: the encoder never learns, the decoder alone does.
        drop_path: stochastic depth rate of the encoder.
        encoder_options: further arguments of timm.create_model for the encoder.
        dice: weight of the Dice loss beside the cross-entropy.
        select: metric by which a validation is better than another; the model of the best one is in output_dir/best,
            that of the last step in output_dir/model.
    """

    CARDS: ClassVar = "segment"
    ESSENTIALS: ClassVar = (
        *("encoder", "data.root", "output_dir", "pretrained", "data.list", "data.val_list", "data.classes"),
        *("data.image_size", "decoder", "frozen", "optim.lr", "optim.batch_size", "epochs", "max_steps"),
        *("precision", "accumulation", "resume"),
    )

    data: SegmentDataConfig
    decoder: Literal["unetpp", "unet", "fpn"] = "unetpp"
    decoder_channels: list[PositiveInt] | None = None
    frozen: bool = False
    drop_path: ShareBelow1 = 0.0
    encoder_options: dict[str, Any] = field(default_factory=dict)
    dice: NonNegativeFloat = 0.0
    select: Literal["miou", "pixel_accuracy", "class_accuracy"] = "miou"
