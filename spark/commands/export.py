"""Turn any checkpoint into an encoder folder that plain timm loads, or into a graph for other runtimes.

Reads a run (its newest checkpoint), one checkpoint folder of a run, an official SparK `.pth` file of any kind, or an
encoder folder, and reports every key. The folder has Hugging Face's layout: config.json, model.safetensors
and README.md, a model card from the run's own files. A FILE.onnx or FILE.pt2 takes images of any size, uint8, and
gives the pyramid of feature maps (docs/export.md); it is written only if it computes what PyTorch does.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from spark.commands.export_options import add_export_options, check_options, option_parser, publication
from spark.errors import FileError, UserError, one_line_errors
from spark.model.encoder import pyramid_info, timm_config
from spark.report.card import (
    NOT_RECORDED,
    PRETRAINING_MARK,
    RunRecord,
    encoder_card,
    public_name,
    read_record,
)
from spark.training.checkpoint import find_run, read_encoder, save_encoder
from spark.weights.graph import OPSET, PROGRAM, TOLERANCE, EncoderGraph, Sizes, is_graph, write_graph
from spark.weights.hub import push


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = option_parser(__doc__)
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
    add_export_options(parser)
    args = parser.parse_args(argv)
    if args.input_size and (len(args.input_size) > 2 or min(args.input_size) < 1):
        parser.error("--input_size takes one number of at least 1 px, or height and width")
    check_options(parser, args)
    return args


def export(args: argparse.Namespace) -> None:
    """Read the checkpoint, write encoder or graph, print what happened."""
    source = Path(args.checkpoint).expanduser()
    if not source.exists():
        raise FileError(f"no checkpoint at {source}: give a run, a checkpoint folder or a .pth file")
    if (source / "checkpoints").is_dir():
        source = find_run(source, str(source)) or source
    encoder, report = read_encoder(source, model_name=args.model_name, averaged=args.ema)
    run = read_record(source, PRETRAINING_MARK) if source.is_dir() else None
    if run is not None and args.ema:
        run = replace(run, averaged=True)
    if is_graph(args.output):
        write_encoder_graph(encoder, args, str(source), run)
        print(report)
        return
    size = None if args.input_size is None else (args.input_size[0], args.input_size[-1])

    def card(config: dict[str, Any]) -> str:
        return encoder_card(config, run, str(source), publication(args))

    folder = save_encoder(encoder, Path(args.output).expanduser(), args.mean, args.std, size, card)
    print(report)
    if args.model_name is not None and hasattr(encoder, "own_encoder"):
        print(f'written; load it with: spark.load_encoder("{folder}", model_name="{args.model_name}")')
    else:
        print(f'written; load it with: timm.create_model("local-dir:{folder}", pretrained=True)')
    if args.push_to_hub:
        print(f"uploaded to {push(folder, args.push_to_hub, args.private)}")


def write_encoder_graph(
    encoder: nn.Module, args: argparse.Namespace, source: str, run: RunRecord | None
) -> None:
    """Write the pyramid of feature maps as a graph, and print how close it is to PyTorch."""
    known = timm_config(encoder)
    mean, std = args.mean or known.get("mean") or (), args.std or known.get("std") or ()
    channels = known["input_size"][0]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UserError(
                f"the graph normalises its images, and {name} of the {channels} channels is not known: give --{name}"
                f" with {channels} values, as the training images were normalised"
            )
    stride = pyramid_info(encoder)[-1].stride
    fixed = None if args.size is None else (args.size[0], args.size[1])
    onnx = Path(args.output).suffix.lower() != PROGRAM
    graph = EncoderGraph(encoder, mean, std, pad=onnx or fixed is not None)
    asked = args.input_size or known["input_size"][1:]
    usual = (asked[0], asked[-1])
    difference = write_graph(
        graph,
        graph.reference,
        Path(args.output).expanduser(),
        outputs=graph.outputs,
        sizes=Sizes(stride, fixed, fixed or usual),
        channels=channels,
        metadata={
            "output": "feature maps [B, C_i, h_i, w_i] of the padded image, the largest first",
            "strides": [level.stride for level in graph.levels],
            "channels": [level.channels for level in graph.levels],
            "encoder": known.get("architecture") or getattr(encoder, "own_encoder", {}).get("own", "own"),
            "source": public_name(source),
            "steps": NOT_RECORDED if run is None else run.steps,
            "weights": NOT_RECORDED if run is None else run.weights,
            "normalisation": {"inside": True, "mean": list(mean), "std": list(std)},
        },
        opset=args.opset or OPSET,
        tolerance=args.tolerance or TOLERANCE,
    )
    print(f"written to {args.output}; off from PyTorch by at most {difference:.1g} of the largest value")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    args = parse_args(argv)
    with one_line_errors():
        export(args)


if __name__ == "__main__":
    main()
