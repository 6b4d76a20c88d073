"""The options of a pretraining run, and how a command line and a YAML file become them.

The dataclasses are the only list of options: their types check, their docstrings are the ``--help``. Depth runs use the
same `parse_config` and `save_config` with their own dataclasses.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from spark.training.cli import require
from spark.training.options import OptimConfig, RunConfig


@dataclass
class ModelConfig:
    """Model: encoder, mask and decoder.

    Attributes:
        name: timm name of the convnet to pretrain, such as resnet50 or convnext_small; or package.module:factory, a
            function of your own that makes one (docs/options.md).
        input_size: size of the training images in pixels, one number or [height, width]; multiples of the stride.
        train_sizes: sizes between which training switches from step to step, each a number or [height, width], such as
            [160,192,224]; null is input_size in every step. Panels are drawn in input_size.
        in_chans: channels of the images; 3 for colour, 1 for grey, others for arrays and multi-band TIFF files.
        mask_ratio: share of the patches that is hidden, between 0 and 1; of a range [low, high] every step draws one.
        mask_block_size: side, in patches, of the blocks that are hidden or shown together; 1 hides single patches.
        patch_size: side of a mask patch in pixels, a multiple of the stride; null is the stride.
        stride: stride of the deepest feature map that is used, such as 16; deeper parts of the encoder neither run nor
            train. null is the encoder's own.
        output_stride: 8, 16 or 32, for networks that timm can dilate to it instead of halving the resolution; no part
            is left out. null is the network as it is.
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
        grad_checkpointing: compute the encoder's activations again in the backward pass instead of keeping them, which
            costs time and saves memory; the results stay the same.
        init: weights to start from, of any image size: a run folder or a checkpoint folder of one, an official .pth
            file, an exported encoder folder, or timm for timm's published weights of this name; null starts at random.
            Other numbers of channels are adapted. A run that resumes goes on from its checkpoint instead.
        init_decoder: auto takes the decoder of init too, if it has one that fits; keep insists on it; drop starts the
            decoder at random.
    """

    name: str
    input_size: int | tuple[int, int] = 224
    train_sizes: tuple[int | tuple[int, int], ...] | None = None
    in_chans: int = 3
    mask_block_size: int = 1
    mask_ratio: float | tuple[float, float] = 0.6
    patch_size: int | None = None
    stride: int | None = None
    output_stride: Literal[8, 16, 32] | None = None
    decoder_width: int = 768
    layout: Literal["auto", "packed", "masked", "spconv", "triton"] = "auto"
    drop_path: float = 0.0
    sync_bn: bool = True
    densify_norm: Literal["bn", "ln"] | None = None
    decoder_stages: int | None = None
    densify_kernel: Literal[1, 3] = 3
    decoder_maps: int = 4
    masked_pixels: Literal["absent", "zero", "token"] = "absent"
    target: Literal["normalised", "pixels", "hog"] = "normalised"
    loss_on: Literal["masked", "all"] = "masked"
    grad_checkpointing: bool = False
    init: str | None = None
    init_decoder: Literal["auto", "keep", "drop"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.mask_ratio, tuple):
            low, high = self.mask_ratio
            require(
                0 < low <= high < 1,
                "model.mask_ratio",
                list(self.mask_ratio),
                "between 0 and 1, or two such numbers, [low, high] with low first",
            )
        else:
            require(0 < self.mask_ratio < 1, "model.mask_ratio", self.mask_ratio, "between 0 and 1")
        require(self.mask_block_size >= 1, "model.mask_block_size", self.mask_block_size, "at least 1")
        require(self.train_sizes != (), "model.train_sizes", "[]", "null or a list with at least one size")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "at least 0 and below 1")
        require(self.in_chans >= 1, "model.in_chans", self.in_chans, "at least 1")
        require(self.decoder_width >= 1, "model.decoder_width", self.decoder_width, "at least 1")
        require(self.decoder_maps >= 1, "model.decoder_maps", self.decoder_maps, "at least 1")
        self.init = None if self.init is None else os.path.expanduser(self.init)
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
            [N, H, W, C], or hf:NAME:SPLIT:COLUMN for a Hugging Face data set; see docs/images.md.
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

    train: str
    streaming: bool = False
    shuffle_buffer: int = 1000
    size: int | None = None
    cache: str | None = None
    workers: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_scale: tuple[float, float] = (0.67, 1.0)
    hflip: float = 0.5
    max_pixels: int = 178_956_970
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", "an empty text", "the place of the images")
        self.train = os.path.expanduser(self.train)
        self.cache = self.cache and os.path.expanduser(self.cache)
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            "data.crop_scale",
            list(self.crop_scale),
            "two shares of the area above 0 and at most 1, [low, high] with low first",
        )
        require(0 <= self.hflip <= 1, "data.hflip", self.hflip, "between 0 and 1")
        require(self.workers is None or self.workers >= 0, "data.workers", self.workers, "null, 0 or more")
        require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "at least 1")
        require(
            self.size is None or (self.streaming and self.size >= 1),
            "data.size",
            self.size,
            "null, or at least 1 with data.streaming true (other sources are counted)",
        )
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "at least 1")
        require(0 <= self.max_unreadable <= 1, "data.max_unreadable", self.max_unreadable, "between 0 and 1")


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

    data: str | None = None
    every: int = 1000
    max_images: int = 1000
    max_share: float = 0.03
    collapse_rank: float = 2.0
    collapse_std: float = 0.01

    def __post_init__(self) -> None:
        self.data = None if self.data is None else os.path.expanduser(self.data)
        require(self.every >= 0, "monitor.every", self.every, "0 or more")
        require(self.max_images >= 2, "monitor.max_images", self.max_images, "at least 2")
        require(0 < self.max_share <= 1, "monitor.max_share", self.max_share, "above 0 and at most 1")
        require(self.collapse_rank >= 0, "monitor.collapse_rank", self.collapse_rank, "0 or more")
        require(self.collapse_std >= 0, "monitor.collapse_std", self.collapse_std, "0 or more")


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """Run: length, precision, logs and checkpoints.

    Attributes:
        compile: the training step's forward and backward through torch.compile, which takes minutes at the start; see
            docs/compile.md for what it can trace. Measurements and pictures are not compiled.
        panels_every: optimizer steps between reconstruction panels in figures/; 0 writes them at the end only.
        export_ema: encoder/ holds the averaged weights (optim.ema_decay) in place of the last ones.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    epochs: float = 1600
    compile: bool = False
    panels_every: int = 1000
    export_ema: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.panels_every >= 0, "panels_every", self.panels_every, "0 or more")
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
