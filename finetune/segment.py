"""Train a model that gives each pixel a class, encoder and decoder, on images with masks.

    spark-segment --config nyu --encoder DIR/encoder --data.root NYU --output_dir DIR2
    python finetune/segment.py --config nyu --encoder DIR/encoder --data.root NYU --output_dir DIR2

SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. SIGUSR1 to the main process writes the model to
output_dir/model at once; the end of the run does so anyway.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import SegmentConfig
from spark.errors import one_line_errors
from spark.training.cli import call_options, make_callable, parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("interrupted; --resume true goes on from the newest checkpoint, if there is one"):
        train_segmentation(parse_config(SegmentConfig, argv, __doc__ or ""))


def train_segmentation(config: SegmentConfig) -> None:
    """Train one model, from its first step or from a checkpoint, to its end or to a request to stop.

    Args:
        config: the options; the folder `config.output_dir` receives the results.

    Raises:
        UserError: something about the options, the data, the encoder or the checkpoint is wrong, or the loss is not
            finite; the sentence says what to do.
        OSError: a file cannot be read or written; likewise.
    """
    from finetune.tasks.segment import SegmentationTraining  # here: --help does not wait for torch
    from spark.training.loop import train
    from spark.training.run import Run

    run = Run(config)
    train(SegmentationTraining(config, run), run)


def call(**options: Any) -> None:
    """The command as a call: ``finetune.segment(encoder="runs/mine/encoder", data="DATA", output_dir="runs/a")``.

    Args:
        options: as `spark.training.cli.call_options` reads them.

    Raises:
        UserError: as `train_segmentation`, and for options that are wrong.
    """
    train_segmentation(call_options(SegmentConfig, options))


make_callable(__name__, call)
if __name__ == "__main__":
    raise SystemExit(main())
