"""Calibrate a depth model: to known distances, to a handful of RGB-D pairs, or to a camera with another lens.

    spark-calibrate --model RUN/model --image room.jpg --points "320,240,2.5; 80,400,1.2"
    --output CALIBRATED
    spark-calibrate --model RUN/model --data.root NYU --data.list nyu_train.txt --pairs 10
    --output CALIBRATED
    spark-calibrate --model RUN/model --camera phone.json --trained_camera nyu --output CALIBRATED

What is found is part of the model's config.json; predict, evaluate and export apply it without being asked.
"""

from collections.abc import Sequence

from finetune.options import CalibrateConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors("interrupted: a calibration is written at the end, whole or not at all"):
        config = parse_config(CalibrateConfig, argv, __doc__ or "")
        from finetune.commands.work.calibrate import calibrate

        calibrate(config)


if __name__ == "__main__":
    raise SystemExit(main())
