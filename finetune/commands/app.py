"""A page in the browser: drop a photo, see its depth in metres, read distances, calibrate, download.

    spark-app --model RUN/model          then open the address that it prints

Hovering tells the depth at a pixel. Clicking chooses a point; with known depths of one point or more the page fits a
scale (of two or more: scale and shift) and shows depth so calibrated, and the command that puts the same calibration
into the model, in place of any that it has. Depth can be had as NPY (metres), 16-bit PNG (millimetres) and coloured
points (PLY).

The page is for this machine: it binds to the loopback address, fetches nothing from elsewhere, and keeps nothing. A
photo is deleted as soon as it is read, what was made of it when the page is closed or the program ends; what a killed
program left, the next start deletes. Whoever opens it to other machines with --host shows it to everyone there, without
a password.
"""

from collections.abc import Sequence

from finetune.options import AppConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors():
        config = parse_config(AppConfig, argv, __doc__ or "")
        from finetune.commands.work.app import serve

        serve(config)


if __name__ == "__main__":
    raise SystemExit(main())
