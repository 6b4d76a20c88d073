"""Train a depth model, encoder and head, on RGB-D pairs: from a pretrained encoder, or from scratch.

    spark-depth --config unetpp_nyu --encoder DIR/encoder --data.root NYU --output_dir DIR2
    python finetune/depth.py --config unetpp_nyu --encoder DIR/encoder --data.root NYU --output_dir DIR2

SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. A single process then ends with exit code 0; of
several processes the state is saved likewise, but their launcher reports the signal, with an exit code of its own.
SIGUSR1 to the main process writes the model to output_dir/model at once; the end of the run does so anyway.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.config import DepthConfig
from spark.errors import one_line_errors
from spark.training.cli import call_options, make_callable, parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("interrupted; --resume true goes on from the newest checkpoint, if there is one"):
        train_depth(parse_config(DepthConfig, argv, __doc__ or ""))


def train_depth(config: DepthConfig) -> None:
    """Train one depth model, from its first step or from a checkpoint, to its end or to a request to stop.

    One process or several, on CPUs or GPUs, run this same function. What happens in a step is in
    `spark.training.loop`.

    Args:
        config: the options; the folder `config.output_dir` receives the results.

    Raises:
        UserError: something about the options, the data, the encoder or the checkpoint is wrong, or the loss is not
            finite; the sentence says what to do.
        OSError: a file cannot be read or written; likewise.
    """
    from finetune.tasks.depth import DepthTraining  # here: --help does not wait for torch
    from spark.training.loop import train
    from spark.training.run import Run

    run = Run(config)
    train(DepthTraining(config, run), run)


def call(**options: Any) -> None:
    """The command as a call: ``finetune.depth(encoder="runs/mine/encoder", data="NYU", output_dir="runs/depth")``.

    Args:
        options: as `spark.training.cli.call_options` reads them.

    Raises:
        UserError: as `train_depth`, and for options that are wrong.
    """
    train_depth(call_options(DepthConfig, options))


make_callable(__name__, call)
if __name__ == "__main__":
    raise SystemExit(main())
