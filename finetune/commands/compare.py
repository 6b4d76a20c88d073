"""Compare results of spark-evaluate image by image: is B better than A, or is it chance?

    spark-compare A.json B.json [C.json ...] --output compared.csv

The first file is the base, each other one is set beside it: metrics, their difference with a bootstrap interval over
images (the same draws for both), on how many images the other is better, and the p values of Wilcoxon's signed-rank
test (p rank) and of the sign test (p sign) on the scores of single images. Only results of the same protocol, by its
hash, on the same images are compared. Images are taken for independent, which frames of one scene are not: intervals
and p values are then too narrow.
"""

from collections.abc import Sequence

from finetune.options import CompareConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(CompareConfig, argv, __doc__ or "")
        from finetune.commands.work.compare import compare_files

        compare_files(config)


if __name__ == "__main__":
    raise SystemExit(main())
