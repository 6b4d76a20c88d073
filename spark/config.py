"""The options of a pretraining run: the only list of them; types check the values, docstrings are the ``--help``."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from spark.training.option_types import (
    LOW_FIRST,
    NOT_EMPTY,
    Channels,
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
    Side,
    Workers,
    at_most,
    require,
)
from spark.training.options import Epochs, OptimizerConfig, RunConfig

ImageSize = Side | tuple[Side, Side]


@dataclass
class SparKConfig:
    """Model: encoder, mask and decoder, the arguments of `spark.SparK`.

    Attributes:
        name: timm name of the convnet to pretrain, such as resnet50 or convnext_small; or package.module:factory, a
            function of your own that makes one (docs/use/model_options.md).
        input_size: size of the training images in pixels, one number or [height, width]; multiples of the stride.
        in_chans: channels of the images; 3 for colour, 1 for grey, others for arrays and multi-band TIFF files.
        mask_ratio: share of the patches that is hidden, between 0 and 1; of a range [low, high] every step draws one.
        mask_block_size: side, in patches, of the blocks that are hidden or shown together; 1 hides single patches.
        patch_size: side of a mask patch in pixels, a multiple of the stride; null is the stride.
        stride: stride of the deepest feature map that is used, such as 16; deeper parts of the encoder neither run nor
            train. null is the encoder's own.
        decoder_width: channels of the decoder at the deepest stage.
        layout: how the encoder runs on masked images; packed computes visible sites only, masked is the reference,
            spconv and triton are packed with the convolutions of these packages (CUDA); auto is the one of them that
            was the fastest in the committed measurements (spark/sparse/measured.csv), packed where there are none.
        drop_path: stochastic depth rate of the encoder.
        sync_bn: batch normalisation takes its statistics over all processes.
        densify_norm: normalisation of the encoder's feature maps before the decoder, bn (batch) or ln (layer); null is
            bn for an encoder with any batch norm, ln for all others.
        decoder_stages: blocks of the decoder, each doubling the resolution; null is as many as the image's resolution
            takes. With fewer, the last one's positions predict squares of pixels: a cheaper decoder.
        densify_kernel: of the projections between encoder and decoder, 3 or, cheaper, 1.
        decoder_maps: feature maps that the decoder receives, the deepest ones; 1 is a decoder of a single scale.
        masked_pixels: what the encoder finds at masked patches; absent is SparK, which encodes visible patches only.
            With zero or token (a learned number for each channel) the dense network runs on the whole image; the
            decoder then gets its features of visible patches (zero) or all of them (token, as in SimMIM). For
            ablations.
        target: what the decoder predicts; pixels, each patch normalised by itself (normalised) or not (pixels), or
            histograms of oriented gradients (hog, as in MaskFeat).
        loss_on: patches that count in the loss, masked or all.
    """

    name: Annotated[str, NOT_EMPTY]
    input_size: ImageSize = 224
    mask_block_size: PositiveInt = 1
    mask_ratio: InnerShare | Annotated[tuple[InnerShare, InnerShare], LOW_FIRST] = 0.6
    in_chans: Channels = 3
    patch_size: int | None = None
    stride: int | None = None
    decoder_width: Annotated[PositiveInt, at_most(8192)] = 768
    layout: Literal["auto", "packed", "masked", "spconv", "triton"] = "auto"
    drop_path: ShareBelow1 = 0.0
    sync_bn: bool = True
    densify_norm: Literal["bn", "ln"] | None = None
    decoder_stages: int | None = None
    densify_kernel: Literal[1, 3] = 3
    decoder_maps: PositiveInt = 4
    masked_pixels: Literal["absent", "zero", "token"] = "absent"
    target: Literal["normalised", "pixels", "hog"] = "normalised"
    loss_on: Literal["masked", "all"] = "masked"


@dataclass
class ModelConfig(SparKConfig):
    """Model: encoder, mask and decoder.

    Attributes:
        train_sizes: sizes between which training switches from step to step, each a number or [height, width], such as
            [160,192,224]; null is input_size in every step. Panels are drawn in input_size.
        output_stride: 8, 16 or 32, for networks that timm can dilate to it instead of halving the resolution; no part
            is left out. null is the network as it is.
        grad_checkpointing: compute the encoder's activations again in the backward pass instead of keeping them, which
            costs time and saves memory; the results stay the same.
        init: weights to start from, of any image size: a run folder or a checkpoint folder of one, an official .pth
            file, an exported encoder folder, or timm for timm's published weights of this name; null starts at random.
            Other numbers of channels are adapted. A run that resumes goes on from its checkpoint instead.
        init_decoder: auto takes the decoder of init too, if it has one that fits; keep insists on it; drop starts the
            decoder at random.
    """

    train_sizes: Annotated[tuple[ImageSize, ...], NOT_EMPTY] | None = None
    output_stride: Literal[8, 16, 32] | None = None
    grad_checkpointing: bool = False
    init: PathText | None = None
    init_decoder: Literal["auto", "keep", "drop"] = "auto"

    def check(self) -> None:
        """Refuse options that do not go together."""
        require(
            self.init is not None or self.init_decoder == "auto",
            "model.init_decoder",
            self.init_decoder,
            "auto where model.init names no weights",
        )


@dataclass
class DataConfig:
    """Data: the unlabeled images and what is done to them.

    Attributes:
        train: the images: a folder (searched recursively), a text file with one image path a line, a pattern such as
            photos/**/*.jpg, tar shards such as shards/{000..127}.tar or https://host/{000..127}.tar, a .npy file of
            [N, H, W, C], or hf:NAME:SPLIT:COLUMN for a Hugging Face data set; see docs/use/images.md.
        streaming: read tar shards or a Hugging Face data set from front to back while training, without a copy on the
            disk, for sets that are larger than it; a shuffle buffer takes the place of the true shuffle.
        shuffle_buffer: images, in their files' form, that each loader process keeps and shuffles when streaming.
        size: images of an epoch when streaming; null takes the number that a Hugging Face data set states, and else
            needs max_steps.
        cache: folder that shards of http addresses are fetched to and kept in; null is shards/ in output_dir.
        workers: processes that read images; null is one for each core that a process may use, at most 8.
        mean: mean of each channel on the scale 0 to 1 (of floats in their own unit), subtracted from the images; null
            is ImageNet's, which only 1 and 3 channels have.
        std: standard deviation of each channel, likewise, dividing the images.
        crop_scale: smallest and largest share of an image's area that a random crop keeps.
        hflip: probability of a horizontal flip.
        max_pixels: images of more pixels are skipped as unreadable.
        max_unreadable: share of the files that may be unreadable before the run stops, between 0 and 1; above 0 it
            allows one file at least, however few there are. Likewise for the shards that cannot be fetched.
    """

    train: Annotated[PathText, NOT_EMPTY]
    streaming: bool = False
    shuffle_buffer: Annotated[PositiveInt, at_most(1_000_000)] = 1000
    size: PositiveInt | None = None
    cache: PathText | None = None
    workers: Workers | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    crop_scale: Annotated[tuple[PositiveShare, PositiveShare], LOW_FIRST] = (0.67, 1.0)
    hflip: Share = 0.5
    max_pixels: PositiveInt = 178_956_970
    max_unreadable: Share = 0.01

    def check(self) -> None:
        """Refuse options that do not go together."""
        require(
            self.size is None or self.streaming,
            "data.size",
            self.size,
            "null without data.streaming true: other sources are counted",
        )


@dataclass
class MonitorConfig:
    """Monitors: how good the encoder's features of unmasked images are, measured while it trains.

    Attributes:
        data: folder of labelled images, train/CLASS/* and val/CLASS/*, to score with nearest neighbours and a linear
            probe; null measures the features of some training images, which takes no labels.
        every: optimizer steps between measurements; 0 never measures.
        max_images: images that are measured, of a labelled folder in each of train/ and val/.
        max_share: share of the run's time that measurements may take; one that would take more is skipped, and its row
            of metrics.jsonl says so. 1 always measures.
        collapse_rank: a smaller effective rank of the features warns that they collapse; of fewer than 8 images, whose
            rank is small in any case, nothing is told.
        collapse_std: a smaller channel_std, between 0 and 1, of the features warns that they collapse.
    """

    data: PathText | None = None
    every: NonNegativeInt = 1000
    max_images: Annotated[int, Rule("of at least 2", lambda value: value >= 2)] = 1000
    max_share: PositiveShare = 0.03
    collapse_rank: NonNegativeFloat = 2.0
    collapse_std: NonNegativeFloat = 0.01


@dataclass
class OptimConfig(OptimizerConfig):
    """Optimizer and schedules.

    Attributes:
        base_lr: learning rate at a batch of 256 images; the run uses base_lr * batch_size / 256.
        betas: decay rates of the optimizer's running moments; null takes those of the paper's recipes, [0.9, 0.95] (its
            ResNets) for encoders with batch norm and [0.9, 0.999] (its ConvNeXts) for all others.
        weight_decay_end: weight decay at the end of its cosine; null keeps it constant.
        cooldown_epochs: epochs at the end of the run in which learning rate and weight decay go to their last values,
            having been constant since the warm-up; such a run can be prolonged, or branched off to end at several
            lengths. null is the paper's schedule, half a cosine over the whole run.
    """

    base_lr: Rate = 2e-4
    weight_decay_end: NonNegativeFloat | None = 0.2
    cooldown_epochs: NonNegativeFloat | None = None


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """Run: length, precision, logs and checkpoints.

    Attributes:
        compile: the training step's forward and backward through torch.compile, which takes minutes at the start; see
            docs/use/compile.md for what it can trace. Measurements and pictures are not compiled.
        panels_every: optimizer steps between reconstruction panels in figures/; 0 writes them at the end only.
        export_ema: encoder/ holds the averaged weights (optim.ema_decay) in place of the last ones.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    epochs: Epochs = 1600
    compile: bool = False
    panels_every: NonNegativeInt = 1000
    export_ema: bool = False

    CARDS: ClassVar = "pretrain"
    ESSENTIALS: ClassVar = (
        *("model.name", "data.train", "output_dir", "model.input_size", "model.init", "model.mask_ratio"),
        *("optim.batch_size", "optim.base_lr", "epochs", "max_steps", "precision", "accumulation"),
        *("data.workers", "resume", "time_limit"),
    )

    def check(self) -> None:
        """Refuse options that do not go together."""
        require(
            not self.export_ema or self.optim.ema_decay is not None,
            "export_ema",
            self.export_ema,
            "false where optim.ema_decay is null: there is no average to export",
        )
        require(
            not (self.compile and self.model.grad_checkpointing),
            "compile",
            self.compile,
            "false together with model.grad_checkpointing: the compiler chooses itself what is computed again",
        )
