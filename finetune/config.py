"""The options of a depth run: dataclasses that `spark.training.cli.parse_config` reads and explains."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.depth_data.labels import LabelOptions
from finetune.depth_data.registry import Kind
from finetune.protocols import PROTOCOLS
from spark.model.encoder import is_own
from spark.training.cli import require
from spark.training.options import RunConfig


def expand_home(options: object, *names: str) -> None:
    """Put the home folder for a leading ~ of these fields, which no shell does after a `=` or in a YAML file.

    Fields that hold no text, such as null, stay as they are.
    """
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))


@dataclass
class DepthModelConfig:
    """Model: head and depth range.

    Attributes:
        head: what turns the encoder's features into depth; unetpp, metric_bins (ZoeDepth), lraspp, linear (a probe of
            the frozen encoder), or fusion (relative depth, without metres).
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

    head: str = "unetpp"
    head_options: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    min_depth: float = 1e-3
    max_depth: float = 10.0
    initial_depth: float = 2.7
    drop_path: float = 0.0
    encoder_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expand_home(self, "init")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "at least 0 and below 1")


@dataclass
class DepthSetConfig:
    """One data set: where it lies, its layout, and how it is read; docs/depth_data.md shows every layout.

    Attributes:
        root: folder that the lists' entries are relative to, or the file or folder that a layout without lists has.
        kind: layout; null recognises it, and the log says which it was.
        list: list of the training pairs, a name inside root or a path; null for a layout with splits of its own.
        depth: which depth of the labelled file trains, raw (with holes) or filled; other layouts have what their files
            hold.
        white_border: of the labelled NYU images, which training crops leave out: fill continues the pixels next to it,
            black paints it black as in the published test images, keep leaves it.
        labels: classes of each pixel that are read along, 13 or 40; null reads none.
        void: pixels without a class are ignored, or are a class of their own behind the others.
        polarity: what the relation > of DIW says of its point A, farther (as its authors' code) or closer.
        depth_scale: metres of one unit of the depth files of a plain folder; null is what a PNG says itself, else
            0.001, and 1 for NPY and PFM.
        bad_depth: NaN, infinite and negative depths are refused, or taken for holes.
        weight: share of the micro-batches, relative to that of the other sets.
    """

    root: str
    kind: Kind | None = None
    list: str | None = None
    depth: Literal["raw", "filled"] = "raw"
    white_border: Literal["keep", "black", "fill"] = "keep"
    labels: Literal[13, 40] | None = None
    void: Literal["ignore", "class"] = "ignore"
    polarity: Literal["farther", "closer"] = "farther"
    depth_scale: float | None = None
    bad_depth: Literal["refuse", "hole"] = "refuse"
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.root), "data.root", "an empty text", "the place of the pairs")
        expand_home(self, "root", "list")
        require(
            self.depth_scale is None or self.depth_scale > 0, "data.depth_scale", self.depth_scale, "above 0"
        )
        require(self.weight > 0, "data.weight", self.weight, "above 0")

    def reading(self) -> dict[str, Any]:
        """How files are read, as options of `open_depth_data`."""
        return {
            "depth": self.depth,
            "white_border": self.white_border,
            "labels": None if self.labels is None else LabelOptions(self.labels, self.void),
            "polarity": self.polarity,
            "depth_scale": self.depth_scale,
            "bad_depth": self.bad_depth,
        }


@dataclass
class DepthDataConfig(DepthSetConfig):
    """Data: the pairs to train and to validate on, their sizes and their augmentation.

    Attributes:
        root: folder that the lists' entries are relative to, or the file or folder that a layout without lists has.
        kind: layout (docs/depth_data.md shows each); null recognises it, and the log says which it was.
        list: list of the training pairs, a name inside root or a path; null for a layout with splits of its own.
        val_root: where the pairs to validate on lie; null is root.
        val_kind: layout of val_root; null is kind, or with val_root recognises it.
        val_list: list of the pairs to validate on; null validates on the test split of a layout that has one, and on
            nothing where a list names the training pairs.
        depth: which depth of the labelled file trains, raw (with holes) or filled; other layouts have what their files
            hold.
        white_border: of the labelled NYU images, which training crops leave out: fill continues the pixels next to it,
            black paints it black as in the published test images, keep leaves it.
        labels: classes of each pixel that are read along, 13 or 40; null reads none.
        void: pixels without a class are ignored, or are a class of their own behind the others.
        polarity: what the relation > of DIW says of its point A, farther (as its authors' code) or closer.
        depth_scale: metres of one unit of the depth files of a plain folder; null is what a PNG says itself, else
            0.001, and 1 for NPY and PFM.
        bad_depth: NaN, infinite and negative depths are refused, or taken for holes.
        weight: share of the micro-batches, relative to that of the further sets.
        sets: further sets to train on in the same run, a list of {root, kind, list, weight, ...}.
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
        cut_depth: probability that a rectangle of the image shows its depth (CutDepth).
        mean: mean of every channel on the scale 0 to 1; null takes what the encoder was trained with.
        std: standard deviation of every channel on the scale 0 to 1; null takes what the encoder was trained with.
        workers: processes that read pairs; null is one for each core that a process may use, at most 8.
        max_unreadable: share of the pairs that may be unreadable before the run stops, between 0 and 1.
        max_empty: share of the run's micro-batches that may be without a single reading before the run stops.
    """

    val_root: str | None = None
    val_kind: Kind | None = None
    val_list: str | None = None
    sets: list[DepthSetConfig] = field(default_factory=list)
    image_size: tuple[int, int] = (480, 640)
    crop_size: tuple[int, int] = (416, 544)
    border: tuple[int, int, int, int] | None = (45, 472, 43, 608)
    zoom: tuple[float, float] = (1.0, 1.5)
    flip: float = 0.5
    rotation: float = 0.0
    colour: float = 0.5
    gamma: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.75, 1.25)
    channel: tuple[float, float] = (0.9, 1.1)
    contrast: tuple[float, float] = (1.0, 1.0)
    cut_depth: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    workers: int | None = None
    max_unreadable: float = 0.01
    max_empty: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "val_root", "val_list")
        require(self.workers is None or self.workers >= 0, "data.workers", self.workers, "null, 0 or more")
        require(0 <= self.max_unreadable <= 1, "data.max_unreadable", self.max_unreadable, "between 0 and 1")
        require(0 <= self.max_empty <= 1, "data.max_empty", self.max_empty, "between 0 and 1")


@dataclass
class DepthOptimConfig:
    """Optimizer and schedule.

    Attributes:
        name: optimizer.
        lr: peak learning rate of the head, for the batch size at hand (it is not scaled with it).
        batch_size: pairs of one optimizer step, over all processes and all accumulated parts.
        betas: decay rates of the optimizer's running moments.
        eps: term added to the optimizer's denominator.
        weight_decay: weight decay, constant over the run.
        schedule: cosine is a linear warm-up and half a cosine down; onecycle is half a cosine up and another one down.
        warmup_steps: optimizer steps of the linear warm-up (cosine); when set it takes the place of warmup_epochs.
        warmup_epochs: epochs of the warm-up (cosine).
        rise: share of the run in which the learning rate rises (onecycle).
        momentum: first of betas, or SGD's momentum, where the learning rate is at its peak and where it is lowest
            (onecycle), such as [0.85, 0.95]; null keeps betas.
        start_factor: learning rate at the first step as a share of the peak.
        end_factor: learning rate at the last step as a share of the peak.
        clip_grad: largest norm of the gradient of all parameters together; null does not clip.
        encoder_lr_factor: factor on the learning rate of the encoder.
        layer_decay: factor from one layer of the encoder to the next shallower one; null is none.
        frozen_epochs: epochs at the start in which the encoder does not learn and its batch statistics stay.
        ema_decay: keep an exponential moving average of the weights, which each step leaves at this share, such as
            0.999; validations, model/ and best/ are then of the average. null keeps none.
    """

    name: Literal["lamb", "adamw", "sgd"] = "adamw"
    lr: float = 1e-4
    batch_size: int = 32
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: Literal["cosine", "onecycle"] = "cosine"
    warmup_steps: int | None = None
    warmup_epochs: float = 1.0
    rise: float = 0.3
    momentum: tuple[float, float] | None = None
    start_factor: float = 0.01
    end_factor: float = 0.01
    clip_grad: float | None = 1.0
    encoder_lr_factor: float = 1.0
    layer_decay: float | None = None
    frozen_epochs: float = 0.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
        require(
            all(0 <= b < 1 for b in self.betas), "optim.betas", list(self.betas), "at least 0 and below 1"
        )
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "optim.warmup_steps",
            self.warmup_steps,
            "0 or more",
        )
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "at least 0")
        require(0 <= self.rise <= 1, "optim.rise", self.rise, "between 0 and 1")
        require(
            self.momentum is None or (self.schedule == "onecycle" and all(0 < m < 1 for m in self.momentum)),
            "optim.momentum",
            self.momentum,
            "null, or with schedule onecycle two numbers between 0 and 1",
        )
        require(0 <= self.start_factor <= 1, "optim.start_factor", self.start_factor, "between 0 and 1")
        require(0 <= self.end_factor <= 1, "optim.end_factor", self.end_factor, "between 0 and 1")
        require(
            self.clip_grad is None or self.clip_grad > 0,
            "optim.clip_grad",
            self.clip_grad,
            "above 0, or null for none",
        )
        require(self.encoder_lr_factor > 0, "optim.encoder_lr_factor", self.encoder_lr_factor, "above 0")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            "optim.layer_decay",
            self.layer_decay,
            "above 0 and at most 1, or null for none",
        )
        require(self.frozen_epochs >= 0, "optim.frozen_epochs", self.frozen_epochs, "0 or more")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "optim.ema_decay",
            self.ema_decay,
            "between 0 and 1, or null for none",
        )


@dataclass(kw_only=True)
class DepthConfig(RunConfig):
    """Run: encoder, losses, length, precision, logs and checkpoints.

    Attributes:
        encoder: exported encoder folder, a .pth file, a timm model name, or package.module:factory of a convnet of your
            own (docs/options.md).
        encoder_name: timm name of the encoder in a .pth file that does not say it, or package.module:factory of a
            convnet of your own in a file or folder, for no file decides which code is run; null asks the file.
        pretrained: for a timm name, load timm's published weights (true) or start from random ones (false); a folder
            or file brings its own weights.
        losses: name and weight of each loss in the sum; silog, l1, mse, berhu, ssim (metres); ssi, gradient
            (relative depth); ranking (pairs of points); smoothness; segmentation (classes, through a decoder that only
            training has). docs/depth.md says what each needs.
        loss_options: arguments of each of these losses, by its name, such as variance_focus of silog.
        sync_bn: batch normalisation takes its statistics over all processes (on CPU each process takes its own).
        protocol: evaluation protocol of the validation and of evaluation.json.
        flip_average: the evaluation averages with the mirror image's prediction; null is the protocol's own choice.
        validate_every: epochs between validations; 0 validates at the end only. The last one is always made.
        select: metric by which a validation is better than another (of protocol diw: whdr, accuracy or wkdr); the model
            of the best one is in output_dir/best, that of the last step in output_dir/model.
        patience: validations in a row without a better one after which the run ends; null never ends it early.
        triptychs: number of validation images that every validation draws into figures/.
    """

    encoder: str
    data: DepthDataConfig
    encoder_name: str | None = None
    pretrained: bool = False
    model: DepthModelConfig = field(default_factory=DepthModelConfig)
    losses: dict[str, float] = field(default_factory=lambda: {"silog": 1.0})
    loss_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    optim: DepthOptimConfig = field(default_factory=DepthOptimConfig)
    epochs: float = 15
    sync_bn: bool = True
    checkpoint_every: int = 500
    protocol: str = "nyu-bts"
    flip_average: bool | None = None
    validate_every: float = 1
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
    patience: int | None = None
    triptychs: int = 4

    def own_encoder(self) -> str | None:
        """package.module:factory of one's own encoder, as the options name it; None for timm's."""
        return next((name for name in (self.encoder, self.encoder_name) if name and is_own(name)), None)

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "encoder")
        require(self.validate_every >= 0, "validate_every", self.validate_every, "0 or more")
        if self.protocol in PROTOCOLS:  # an unknown name is refused by its reader
            known = PROTOCOLS[self.protocol].metrics
            wanted = f"a metric of protocol {self.protocol}: {', '.join(known)}"
            require(self.select in known, "select", self.select, wanted)
        require(self.patience is None or self.patience >= 1, "patience", self.patience, "null or at least 1")
        require(self.triptychs >= 0, "triptychs", self.triptychs, "0 or more")
