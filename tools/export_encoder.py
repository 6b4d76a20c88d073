"""Turn any checkpoint into an encoder folder that plain timm loads.

Reads a run (its newest checkpoint), one checkpoint folder of a run, an official SparK `.pth` file of any kind, or an
encoder folder, and says what became of every key.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from spark.checkpoint import find_run, read_encoder, save_encoder
from spark.run import one_line_errors


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run's output folder, one of its checkpoints/step_*/, an official .pth file, or an encoder folder",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the averaged weights of a run's checkpoint (optim.ema_decay) instead of the last ones",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="encoder folder to write")
    parser.add_argument(
        "--model_name",
        metavar="NAME",
        help="timm name of the encoder, for a .pth file that does not say it; package.module:factory of your own",
    )
    parser.add_argument(
        "--mean",
        nargs="+",
        type=float,
        metavar="X",
        help="mean of each channel that the training images were normalised with (default: what the checkpoint says)",
    )
    parser.add_argument(
        "--std", nargs="+", type=float, metavar="X", help="standard deviation of each, likewise"
    )
    parser.add_argument(
        "--input_size",
        nargs="+",
        type=int,
        metavar="PX",
        help="training size for the record: one number, or H W",
    )
    args = parser.parse_args(argv)
    if args.input_size and len(args.input_size) > 2:
        parser.error("--input_size takes one number, or height and width")
    return args


def export(args: argparse.Namespace) -> None:
    """Read the checkpoint, write the encoder, print what happened."""
    source = Path(args.checkpoint).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"no checkpoint at {source}: give a run, a checkpoint folder or a .pth file")
    if (source / "checkpoints").is_dir():
        source = find_run(source, str(source)) or source
    encoder, report = read_encoder(source, model_name=args.model_name, averaged=args.ema)
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])
    folder = save_encoder(encoder, args.output, args.mean, args.std, size)
    print(report)
    if args.model_name is not None and hasattr(encoder, "own_encoder"):
        print(f'written; load it with: spark.load_encoder("{folder}", model_name="{args.model_name}")')
    else:
        print(f'written; load it with: timm.create_model("local-dir:{folder}", pretrained=True)')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    args = parse_args(argv)
    with one_line_errors():
        export(args)


if __name__ == "__main__":
    main()
