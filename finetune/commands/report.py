"""spark-report: the page about runs, pretraining, depth and classes, as `spark.commands.report` describes it."""

from collections.abc import Sequence

from spark.commands import report as pretraining
from spark.errors import one_line_errors
from spark.options import ReportConfig
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(ReportConfig, argv, pretraining.__doc__ or "")
        from finetune.report import DEPTH
        from finetune.report.classes import CLASSES
        from spark.commands.work.report import report
        from spark.report import PRETRAINING

        report(config, (CLASSES, DEPTH, PRETRAINING))


if __name__ == "__main__":
    raise SystemExit(main())
