"""Train a classifier on labelled photos from a pretrained encoder: all of it, or a linear layer on frozen features.

    spark-classify --config finetune --encoder DIR/encoder --data.root LABELLED --output_dir DIR2
    python finetune/classify.py --config finetune --encoder DIR/encoder --data.root LABELLED --output_dir DIR2

LABELLED holds train/CLASS/* and val/CLASS/*. OUTPUT_DIR/model is a timm model with its classifier:
timm.create_model("local-dir:OUTPUT_DIR/model", pretrained=True). SIGTERM and Ctrl-C save a checkpoint; continue with
--resume true.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import ClassifyConfig
from spark.errors import one_line_errors
from spark.training.cli import call_options, make_callable, parse_config


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
