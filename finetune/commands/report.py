"""spark-report: the page about runs, pretraining and depth ones. Options and examples: `spark.commands.report`."""

from collections.abc import Sequence

from finetune.report import DEPTH
from spark.commands import report
from spark.report import PRETRAINING
from spark.training.cli import start


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    report.main(argv, (DEPTH, PRETRAINING))


if __name__ == "__main__":
    start(main)
