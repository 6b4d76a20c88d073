"""What lies there, and what is wrong with it: examine a data set of depth before training on it.

    spark-doctor NYU --list nyu_train.txt --output pairs.png

Recognises the layout (docs/use/depth_data.md), draws five pairs, and names what is wrong: transposed, mirrored, 8-bit,
filled instead of raw, wrong scale, test scenes in training, white border kept, missing intrinsics, files that cannot be
read. Exit code 0: nothing is wrong; 1: something is, in the report; 2: the question was wrong.
"""

from collections.abc import Sequence

from finetune.options import DoctorConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; it ends with exit code 0, with 1 where something is wrong, 2 for a user's error."""
    with one_line_errors():
        config = parse_config(DoctorConfig, argv, __doc__ or "")
        from finetune.commands.work.doctor import examine

        healthy = examine(config)
    raise SystemExit(0 if healthy else 1)


if __name__ == "__main__":
    raise SystemExit(main())
