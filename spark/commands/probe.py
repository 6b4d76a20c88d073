"""How good are an encoder's frozen features?  kNN and a linear probe on a folder of labelled images.

    spark-probe --encoder RUN/encoder resnet18 --data FOLDER --output probe.json

FOLDER holds train/CLASS/* and val/CLASS/*, with the same classes. Images go through the frozen encoder in eval mode; a
feature map, averaged over its positions, is the feature vector [D] of an image. Features are standardised with mean and
standard deviation of the training split. Then, with no training of the encoder:

- kNN: the vote of the k nearest training images by cosine similarity s, each with weight exp(s / 0.07), as in Wu et
  al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (section 3.4), and later DINO.
- linear: multinomial logistic regression, by full-batch L-BFGS. The L2 strength is the one that does best on a held-out
  tenth of the training split; the validation split only scores the result.

Prints a table and writes it, with every setting, to the output file. Accuracies are top-1, as shares of the images.
"""

import shlex
import sys
from collections.abc import Sequence

from spark.errors import one_line_errors
from spark.options import ProbeConfig
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(ProbeConfig, argv, __doc__ or "")
        from spark.commands.work.probe import run_and_print

        arguments = sys.argv[1:] if argv is None else argv
        run_and_print(config, shlex.join(["spark-probe", *arguments]))


if __name__ == "__main__":
    raise SystemExit(main())
