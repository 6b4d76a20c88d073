"""One self-contained HTML page about a run, or about several side by side.

    spark-report RUN                               writes RUN/report.html anew
    spark-report RUN RUN2 RUN3 --output page.html
    spark-report pretraining=RUN scratch=RUN1 scratch=RUN2 SparK=RUN3 --output page.html

Every run writes such a page when it ends. This writes it again, for a run that is under way, that crashed, or that was
scored since, and compares runs. RUN is the output_dir of a run. LABEL=RUN names it on the page; a label given several
times means seeds of one experiment, and the others are compared with the first label. Curves come from metrics.jsonl,
pictures from figures/, settings from config.yaml, scores from results.json or else evaluation.json, machines from
environment.json. The page says what is missing or damaged.

`python -m spark.commands.report` knows pretraining runs only.
"""

from collections.abc import Sequence

from spark.errors import one_line_errors
from spark.options import ReportConfig
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(ReportConfig, argv, __doc__ or "")
        from spark.commands.work.report import report
        from spark.report import PRETRAINING

        report(config, (PRETRAINING,))


if __name__ == "__main__":
    raise SystemExit(main())
