"""Train a classifier on labelled photos from a pretrained encoder: all of it, or a linear layer on frozen features.

    spark-classify --config classify --encoder DIR/encoder --data.root LABELLED --output_dir DIR2
    python finetune/classify.py --config classify --encoder DIR/encoder --data.root LABELLED --output_dir DIR2

LABELLED holds train/CLASS/* and val/CLASS/*. OUTPUT_DIR/model is a timm model with its classifier:
timm.create_model("local-dir:OUTPUT_DIR/model", pretrained=True). SIGTERM and Ctrl-C save a checkpoint; continue with
--resume true.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import TuningConfig, TuningOptimConfig
from spark.errors import one_line_errors
from spark.training.cli import call_options, make_callable, parse_config
from spark.training.option_types import (
    LOW_FIRST,
    PathText,
    PositiveInt,
    PositiveShare,
    Share,
    ShareBelow1,
    Workers,
    at_most,
)


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
    optim: TuningOptimConfig = field(default_factory=lambda: TuningOptimConfig(lr=1e-3, batch_size=64))
    linear: bool = False
    drop_path: ShareBelow1 = 0.0
    smoothing: ShareBelow1 = 0.0
    encoder_options: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("interrupted; --resume true goes on from the newest checkpoint, if there is one"):
        classify(parse_config(ClassifyConfig, argv, __doc__ or ""))


def classify(config: ClassifyConfig) -> None:
    """Train one classifier, from its first step or from a checkpoint, to its end or to a request to stop.

    Raises:
        UserError: something about the options, the data, the encoder or the checkpoint is wrong.
        OSError: a file cannot be read or written.
    """
    from finetune.tasks.classify import Classification  # here: --help does not wait for torch
    from spark.training.loop import train
    from spark.training.run import Run

    run = Run(config)
    train(Classification(config, run), run)


def call(**options: Any) -> None:
    """The command as a call: ``finetune.classify(encoder="runs/mine/encoder", data="LABELLED", output_dir="runs/c")``.

    Args:
        options: as `spark.training.cli.call_options` reads them.

    Raises:
        UserError: as `classify`, and for options that are wrong.
    """
    classify(call_options(ClassifyConfig, options))


make_callable(__name__, call)
if __name__ == "__main__":
    raise SystemExit(main())
