"""Write any source of images as tar shards of smaller ones, which data.train of a pretraining run reads.

    spark-prepare --input ~/photos --output shards --short_side 256
    spark-prepare --input 'https://host/{000..127}.tar' --output shards
    spark-pretrain --config small --data.train shards --output_dir runs/mine

--input is any form of data.train (docs/use/images.md). Photographs become JPEGs. Arrays and, with --in_chans as the
model is to have it, multi-band TIFF files become arrays of the same channels and type (KEY.image.npy).

A run that was stopped goes on with the same command: shards that are finished stay, and no shard has its name before it
is whole. report.json says what was left out and why.
"""

from collections.abc import Sequence

from spark.errors import one_line_errors
from spark.options import PrepareConfig
from spark.training.cli import parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    with one_line_errors("stopped; the same command goes on with the shards that are missing"):
        config = parse_config(PrepareConfig, argv, __doc__ or "")
        from spark.commands.work.prepare import prepare

        prepare(config)


if __name__ == "__main__":
    raise SystemExit(main())
