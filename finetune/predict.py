"""Predict depth for images and videos.

    spark-predict --model RUN/model --input PHOTOS --output DEPTH

For every image, under its own name and subfolder: NAME.npy (float32, metres, the image's own size), NAME_mm.png
(uint16, millimetres; 0 = no prediction, 65535 = 65.535 m or more) and NAME_colour.png (a picture with a colour bar in
metres); for every video NAME_colour.mp4. `--formats` asks for others. predictions.json says what was written and what
could not be read. A model without metres (head fusion) writes NAME_disparity.npy, float32 inverse depth up to scale and
shift, and NAME_colour.png from its nearest to its farthest, until it is calibrated (spark-calibrate).

Exit code: 0, also where some images could not be read (they are named); 1 where nothing could be; 2 for a wrong option
or input; 130 after Ctrl-C.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: its folder comes first on the path, where the clone's belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from finetune.options import PredictConfig
from spark.errors import one_line_errors
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if nothing could be read, or 130 after Ctrl-C."""
    with one_line_errors("interrupted before anything was written"):  # later on predict handles it
        config = parse_config(PredictConfig, argv, __doc__ or "")
        from finetune.commands.work.predict import predict

        return predict(config)


if __name__ == "__main__":
    raise SystemExit(main())
