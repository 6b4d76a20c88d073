"""Evaluate depth predictions under named protocols: of a model, of a folder of files, or of a baseline.

    spark-evaluate --model RUN/model --data.root NYU --data.list nyu_val.txt --output results.json
    spark-evaluate --predictions DEPTH --protocol all ...
    spark-evaluate --baseline mean --baseline_list nyu_train.txt --protocol nyu-bts,nyu-laina ...

Predictions are made once, whatever the number of protocols. Prints a table and writes it, with every setting, the
metrics of every image and bootstrap intervals, to the output file: of one protocol its results, of several
{"protocols": [results, ...]}.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.options import EvaluationConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(EvaluationConfig, argv, __doc__ or "")
        from finetune.commands.work.evaluate import evaluate

        evaluate(config)


if __name__ == "__main__":
    raise SystemExit(main())
