"""Pretrain any timm convnet on unlabeled images with SparK, sparse and hierarchical masked modelling.

    spark-pretrain --config small --data.train PATH --output_dir DIR
    accelerate launch -m spark.pretrain --config official_resnet50 --data.train PATH --output_dir DIR

SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. A single process then ends with exit code 0; of
several processes the state is saved likewise, but their launcher reports the signal, with an exit code of its own.
SIGUSR1 to the main process writes the encoder to output_dir/encoder at once; the end of the run does so anyway.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from spark.config import PretrainConfig
from spark.errors import one_line_errors
from spark.training.cli import call_options, make_callable, parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors("interrupted; --resume true goes on from the newest checkpoint, if there is one"):
        pretrain(parse_config(PretrainConfig, argv, __doc__ or ""))


def pretrain(config: PretrainConfig) -> None:
    """Run one pretraining, from its first step or from a checkpoint, to its end or to a request to stop.

    What happens in a step is in `spark.training.loop`. The folder `config.output_dir` receives the results.

    Raises:
        UserError: about options, data, checkpoint, or a loss that is not finite; says what to do.
        OSError: a file cannot be read or written.
    """
    from spark.task import Pretraining  # here: --help does not wait for torch
    from spark.training.loop import train
    from spark.training.run import Run

    run = Run(config)
    train(Pretraining(config, run), run)


def call(**options: Any) -> None:
    """The command as a call: ``spark.pretrain(data="photos/", model="resnet50", output_dir="runs/mine")``.

    `spark.training.cli.call_options` explains the options. Raises what `pretrain` raises.
    """
    pretrain(call_options(PretrainConfig, options))


make_callable(__name__, call)
if __name__ == "__main__":
    raise SystemExit(main())
