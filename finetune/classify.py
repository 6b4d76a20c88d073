"""Train a classifier of photos, encoder and linear layer, on folders of classes: fine-tuned, or on a frozen encoder.

    spark-classify --config classify_finetune --encoder DIR/encoder --data.root LABELLED --output_dir DIR2
    python finetune/classify.py --config classify_finetune --encoder DIR/encoder --data.root LABELLED --output_dir DIR2

SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. SIGUSR1 to the main process writes the model to
output_dir/model at once; the end of the run does so anyway.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.label_config import ClassifyConfig
from spark.errors import one_line_errors
from spark.training.cli import call_options, make_callable, parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("interrupted; --resume true goes on from the newest checkpoint, if there is one"):
        train_classifier(parse_config(ClassifyConfig, argv, __doc__ or ""))


def train_classifier(config: ClassifyConfig) -> None:
    """Train one model, from its first step or from a checkpoint, to its end or to a request to stop.

    Args:
        config: the options; the folder `config.output_dir` receives the results.

    Raises:
        UserError: something about the options, the data, the encoder or the checkpoint is wrong, or the loss is not
            finite; the sentence says what to do.
        OSError: a file cannot be read or written; likewise.
    """
    from finetune.tasks.classify import Classification  # here: --help does not wait for torch
    from spark.training.loop import train
    from spark.training.run import Run

    run = Run(config)
    train(Classification(config, run), run)


def call(**options: Any) -> None:
    """The command as a call: ``finetune.classify(encoder="runs/mine/encoder", data="DATA", output_dir="runs/a")``.

    Args:
        options: as `spark.training.cli.call_options` reads them.

    Raises:
        UserError: as `train_classifier`, and for options that are wrong.
    """
    train_classifier(call_options(ClassifyConfig, options))


make_callable(__name__, call)
if __name__ == "__main__":
    raise SystemExit(main())
