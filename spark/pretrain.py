"""Pretrain any timm convnet on unlabeled images with SparK: options -> task -> train.

    python spark/pretrain.py --config small --data.train PATH --output_dir DIR
    accelerate launch spark/pretrain.py --config official_resnet50 --data.train PATH --output_dir DIR

One process or several, on CPUs or GPUs, run this same file. What happens in a step is in `spark.training.loop`.
"""

from collections.abc import Sequence

from spark.config import PretrainConfig
from spark.errors import one_line_errors
from spark.task import Pretraining
from spark.training.cli import parse_config
from spark.training.loop import train
from spark.training.run import Run

DESCRIPTION = """Pretrain a timm convnet on unlabeled images with SparK (sparse and hierarchical masked modelling).
SIGTERM and Ctrl-C save a checkpoint; continue with --resume true. A single process then ends with exit code 0; of
several processes the state is saved likewise, but their launcher reports the signal, with an exit code of its own.
SIGUSR1 to the main process writes the encoder to output_dir/encoder at once; the end of the run does so anyway."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        pretrain(parse_config(PretrainConfig, argv, DESCRIPTION))


def pretrain(config: PretrainConfig) -> None:
    """Run one pretraining, from its first step or from a checkpoint, to its end or to a request to stop.

    Args:
        config: the options; the folder `config.output_dir` receives the results.

    Raises:
        UserError: something about the options, the data or the checkpoint is wrong, or the loss is not finite; the
            sentence says what to do.
        OSError: a file cannot be read or written; likewise.
    """
    run = Run(config)
    train(Pretraining(config, run), run)


if __name__ == "__main__":
    main()
