"""The options of the commands beside pretraining: export, probe, prepare and report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from spark.errors import UserError
from spark.training.option_types import (
    NOT_EMPTY,
    BatchSize,
    Channels,
    NonNegativeFloat,
    Options,
    PathText,
    PositiveFloat,
    PositiveInt,
    Share,
    Side,
    Workers,
    at_most,
    between,
)
from spark.training.options import Seed

Sizes = Side | tuple[Side, Side]
OTHER_FILES = (".onx", ".onnxx", ".ort", ".pb", ".pt", ".pte", ".pth", ".bin", ".ckpt", ".safetensors")
"""Ends of names that mean a file, of a kind that is not written."""


@dataclass(kw_only=True)
class ExportOptions(Options):
    """Export: a graph for other runtimes, or a folder, which may go to the Hugging Face hub.

    Attributes:
        output: FILE.onnx, FILE.pt2, or a folder to write.
        size: of FILE.onnx and FILE.pt2; the only size [height, width] of images that it takes, in pixels. null is any
            size, of .pt2 multiples of the stride.
        opset: of FILE.onnx; null is 17.
        tolerance: of FILE.onnx and FILE.pt2; largest difference from PyTorch, as a share of the largest value. null is
            0.0001.
        license: of a folder's model card; license of the weights, as the hub calls it: mit, cc-by-nc-4.0, ...
        datasets: of a folder's model card; names that the training data has on the hub.
        base_model: of a folder's model card; name on the hub of the model that training began with.
        push_to_hub: OWNER/NAME; upload the folder to the hub, too.
        private: of push_to_hub; nobody else sees it.
    """

    output: PathText
    size: tuple[Side, Side] | None = None
    opset: Annotated[PositiveInt, at_most(30)] | None = None
    tolerance: PositiveFloat | None = None
    license: str | None = None
    datasets: list[str] | None = None
    base_model: str | None = None
    push_to_hub: str | None = None
    private: bool = False

    @property
    def is_graph(self) -> bool:
        """Whether the output is FILE.onnx or FILE.pt2, not a folder."""
        return Path(self.output).suffix.lower() in (".onnx", ".pt2")

    def check(self) -> None:
        """Refuse options of the other kind of output."""
        suffix = Path(self.output).suffix.lower()
        if suffix in OTHER_FILES:
            raise UserError(
                f"a {suffix} file is not written: --output takes FILE.onnx, FILE.pt2 or a folder, which gets"
                " model.safetensors"
            )
        graph, hub = (
            ("size", "opset", "tolerance"),
            ("license", "datasets", "base_model", "push_to_hub", "private"),
        )
        for name in hub if self.is_graph else graph:
            if getattr(self, name) not in (None, False):
                other = "a folder" if self.is_graph else "FILE.onnx and FILE.pt2"
                raise UserError(f"--{name} is for {other}, and --output is {self.output}")
        if self.private and not self.push_to_hub:
            raise UserError("--private is for --push_to_hub")
        if self.opset is not None and suffix == ".pt2":
            raise UserError(f"--opset is of ONNX, and --output is {self.output}")


@dataclass(kw_only=True)
class ExportConfig(ExportOptions):
    """Export of an encoder.

    Attributes:
        checkpoint: a run's output folder, one of its checkpoints/step_*/, an official .pth file, or an encoder folder.
        ema: take the averaged weights of a run's checkpoint (optim.ema_decay) instead of the last ones.
        model_name: timm name of the encoder, for a .pth file that does not say it; package.module:factory of your own.
        mean: mean of each channel that the training images were normalised with; null is what the checkpoint says.
        std: standard deviation of each channel, likewise.
        input_size: training size for the record, one number or [height, width]; null is what the checkpoint says.
    """

    ESSENTIALS: ClassVar = (
        *("checkpoint", "output", "ema", "model_name", "mean", "std", "input_size", "size", "license"),
        *("push_to_hub", "private"),
    )

    checkpoint: PathText
    ema: bool = False
    model_name: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    input_size: Sizes | None = None


@dataclass(kw_only=True)
class ProbeConfig(Options):
    """Probe of frozen features on labelled images.

    Attributes:
        encoder: exported folders, checkpoint folders of runs, .pth files, or names (random weights), timm's or
            package.module:factory of your own.
        data: folder of labelled images, train/CLASS/* and val/CLASS/*.
        output: JSON file for the results.
        pretrained: of timm names, timm's published weights (network).
        model_name: timm name of the encoder in a .pth file that does not say it; package.module:factory of your own in
            any file or folder.
        size: images are resized and centre cropped to it, one number or [height, width]; null is the size that the
            first encoder was trained at, for all of them.
        level: feature map to use; deepest, all (concatenated), or a stride in pixels.
        k: neighbours that vote.
        l2: strengths that the linear probe chooses from.
        seed: of random weights and of the held-out tenth.
        device: where to compute; auto takes a GPU if there is one.
        precision: of the encoder.
        batch_size: images of one forward.
        workers: processes that read images; 0 is this one.
    """

    encoder: Annotated[list[PathText], NOT_EMPTY]
    data: PathText
    output: PathText
    pretrained: bool = False
    model_name: str | None = None
    size: Sizes | None = None
    level: str = "deepest"
    k: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (10, 20)
    l2: Annotated[tuple[NonNegativeFloat, ...], NOT_EMPTY] = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: BatchSize = 64
    workers: Workers = 0


@dataclass(kw_only=True)
class PrepareConfig(Options):
    """Shards of smaller images.

    Attributes:
        input: any form of data.train (docs/use/images.md).
        output: folder of the shards.
        in_chans: channels, as in model.in_chans of the run that reads the shards; 3 and 1 read photographs and arrays,
            other numbers read arrays and multi-band TIFF files.
        short_side: of the images, unless smaller, in pixels.
        min_side: images with a shorter side are left out, in pixels.
        quality: of the JPEGs, 1 to 100.
        shard_size: images a shard.
        max_pixels: images of more pixels are left out.
        max_unreadable: share of the shards of an address to do without.
        workers: processes; null is one for each core.
    """

    input: PathText
    output: PathText
    in_chans: Channels = 3
    short_side: Side = 256
    min_side: Side = 1
    quality: Annotated[int, between(1, 100)] = 90
    shard_size: PositiveInt = 1000
    max_pixels: PositiveInt = 178_956_970
    max_unreadable: Share = 0.0
    workers: Annotated[PositiveInt, at_most(256)] | None = None


@dataclass(kw_only=True)
class ReportConfig(Options):
    """Page about one run or several.

    Attributes:
        runs: output_dir of each run, or LABEL=output_dir; a label given several times means seeds of one thing.
        output: HTML file to write; null is report.html in the folder of the run.
        title: heading of the page.
        lead: a sentence below the heading.
        steps: JSON file of commands and durations to list.
    """

    POSITIONAL: ClassVar = "runs"

    runs: Annotated[list[str], NOT_EMPTY]
    output: PathText | None = None
    title: str = ""
    lead: str = ""
    steps: PathText | None = None
