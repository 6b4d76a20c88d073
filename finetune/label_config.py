"""The options of runs that learn classes, of photos and of pixels; types check the values, docstrings are the help."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from finetune.config import TransferConfig, ViewConfig
from finetune.options import PlaceConfig
from spark.training.option_types import (
    LOW_FIRST,
    NOT_EMPTY,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Rule,
    Share,
    ShareBelow1,
    require,
)
from spark.training.options import Seed

MaskKind = Literal["masks", "nyu_sync", "nyu_labeled"]
ClassCount = Annotated[int, Rule("from 2 to 255", lambda value: 2 <= value <= 255)]


@dataclass
class LabelModelConfig:
    """Model.

    Attributes:
        frozen: the encoder never learns: what its features are good for as they are.
        drop_path: stochastic depth rate of the encoder.
        encoder_options: further arguments of timm.create_model for the encoder, such as zero_init_last of a ResNet,
            which false makes all residual branches count from the start.
    """

    frozen: bool = False
    drop_path: ShareBelow1 = 0.0
    encoder_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ClassifyDataConfig:
    """Data: photos in folders of classes, and their augmentation.

    Attributes:
        root: folder with train/CLASS/* and val/CLASS/*.
        labels: share of the training photos of each class that are used, the same ones in every run of a labels_seed,
            a smaller share inside a larger one; above 1 a number of photos of each class. 1 is all of them.
        labels_seed: seed of the choice of these.
        size: side of the photos in pixels, as the network sees them.
        crop_scale: smallest and largest share of a photo's area that a random crop covers.
        flip: probability of a horizontal flip.
        augment: further augmentation, torchvision's TrivialAugmentWide or RandAugment.
        mixup: alpha of mixup, which trains on sums of two photos; 0 is none.
        mean: mean of every channel on the scale 0 to 1; null takes what the encoder was trained with.
        std: standard deviation of every channel on the scale 0 to 1; null takes what the encoder was trained with.
        workers: processes that read photos; null is one for each core that a process may use, at most 8.
        max_unreadable: share of the photos that may be unreadable before the run stops, between 0 and 1.
    """

    root: Annotated[PathText, NOT_EMPTY]
    labels: PositiveFloat = 1.0
    labels_seed: Seed = 0
    size: PositiveInt = 224
    crop_scale: Annotated[tuple[PositiveShare, PositiveShare], LOW_FIRST] = (0.35, 1.0)
    flip: Share = 0.5
    augment: Literal["none", "trivial", "rand"] = "none"
    mixup: NonNegativeFloat = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    workers: NonNegativeInt | None = None
    max_unreadable: Share = 0.01

    def check(self) -> None:
        """Refuse parts of photos."""
        whole = self.labels <= 1 or self.labels == int(self.labels)
        require(
            whole, "data.labels", self.labels, "a share up to 1, or a whole number of photos of each class"
        )


@dataclass(kw_only=True)
class ClassifyConfig(TransferConfig):
    """Run: encoder, length, precision, logs and checkpoints.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        select: metric by which a validation is better than another; the model of the best one is in output_dir/best,
            that of the last step in output_dir/model.
    """

    CARDS: ClassVar = "classify"
    ESSENTIALS: ClassVar = (
        *("encoder", "data.root", "output_dir", "pretrained", "data.labels", "data.labels_seed", "data.size"),
        *("model.frozen", "optim.lr", "optim.layer_decay", "optim.batch_size", "epochs", "max_steps"),
        *("precision", "accumulation", "resume"),
    )

    data: ClassifyDataConfig
    model: LabelModelConfig = field(default_factory=LabelModelConfig)
    label_smoothing: ShareBelow1 = 0.0
    select: Literal["top1", "top5", "mean_accuracy", "cross_entropy"] = "top1"


@dataclass
class SegmentModelConfig(LabelModelConfig):
    """Model: encoder and decoder.

    Attributes:
        decoder: decoder of segmentation_models_pytorch; unetpp and unet take any pyramid, fpn maps at four strides.
        decoder_channels: width of unetpp and unet at each resolution, from half the deepest stride up to stride 1; null
            is 256 down to 16.
    """

    decoder: Literal["unetpp", "unet", "fpn"] = "unetpp"
    decoder_channels: list[PositiveInt] | None = None


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
    kind: MaskKind | None = None
    classes: ClassCount | list[str] = 13
    white_border: Literal["keep", "black", "fill"] = "keep"
    border: tuple[int, int, int, int] | None = None
    workers: NonNegativeInt | None = None
    max_unreadable: Share = 0.01

    def check(self) -> None:
        """Refuse names that are no classes."""
        if isinstance(self.classes, list):
            different = 2 <= len(set(self.classes)) == len(self.classes) <= 255
            require(different, "data.classes", self.classes, "2 to 255 different names, or their number")


@dataclass(kw_only=True)
class SegmentConfig(TransferConfig):
    """Run: encoder, length, precision, logs and checkpoints.

    Attributes:
        dice: weight of the Dice loss beside the cross-entropy.
        select: metric by which a validation is better than another; the model of the best one is in output_dir/best,
            that of the last step in output_dir/model.
    """

    CARDS: ClassVar = "segment"
    ESSENTIALS: ClassVar = (
        *("encoder", "data.root", "output_dir", "pretrained", "data.list", "data.val_list", "data.classes"),
        *("data.image_size", "model.decoder", "model.frozen", "optim.lr", "optim.batch_size", "epochs"),
        *("max_steps", "precision", "accumulation", "resume"),
    )

    data: SegmentDataConfig
    model: SegmentModelConfig = field(default_factory=SegmentModelConfig)
    dice: NonNegativeFloat = 0.0
    select: Literal["miou", "pixel_accuracy", "mean_accuracy"] = "miou"
