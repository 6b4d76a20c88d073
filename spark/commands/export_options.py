"""The options that spark/commands/export.py and finetune/commands/export.py share."""

import argparse
from pathlib import Path

from spark.report.card import Publication
from spark.weights.graph import ONNX, OPSET, PROGRAM, TOLERANCE, is_graph

FILES = (".onx", ".onnxx", ".ort", ".pb", ".pt", ".pte", ".pth", ".bin", ".ckpt", ".safetensors")
"""Ends of names that mean a file, of a kind that is not written."""


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --output; a command adds its input, and then the groups of `add_export_options`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="FILE.onnx, FILE.pt2, or a folder to write"
    )
    return parser


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Options of a graph, and of a folder."""
    _add_graph_options(parser)
    _add_hub_options(parser)


def _add_graph_options(parser: argparse.ArgumentParser) -> None:
    graph = parser.add_argument_group("graph", "of FILE.onnx and FILE.pt2")
    graph.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="the only size of images that it is to take, in pixels (default: any; of .pt2: multiples of the stride)",
    )
    graph.add_argument("--opset", type=int, metavar="N", help=f"of ONNX (default: {OPSET})")
    graph.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help=f"largest difference from PyTorch, as a share of the largest value (default: {TOLERANCE:g})",
    )


def _add_hub_options(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("hub", "of a folder: what only you can say on its model card, and upload")
    hub.add_argument(
        "--license", metavar="ID", help="of the weights, as the hub calls it: mit, cc-by-nc-4.0, ..."
    )
    hub.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="names that the training data has on the hub"
    )
    hub.add_argument(
        "--base_model", metavar="NAME", help="name on the hub of the model that training began with"
    )
    hub.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder to the hub, too")
    hub.add_argument("--private", action="store_true", help="of --push_to_hub: nobody else sees it")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of the other kind of output, and numbers that cannot be."""
    graph, hub = (
        ("size", "opset", "tolerance"),
        ("license", "datasets", "base_model", "push_to_hub", "private"),
    )
    suffix = Path(args.output).suffix.lower()
    if suffix in FILES:
        parser.error(
            f"a {suffix} file is not written: --output takes FILE{ONNX}, FILE{PROGRAM} or a folder, which gets"
            " model.safetensors"
        )
    for name in hub if is_graph(args.output) else graph:
        value = getattr(args, name)
        if value is not None and value is not False:  # 0 counts as given
            other = "a folder" if is_graph(args.output) else "FILE.onnx and FILE.pt2"
            parser.error(f"--{name} is for {other}, and --output is {args.output}")
    if args.private and not args.push_to_hub:
        parser.error("--private is for --push_to_hub")
    if args.opset is not None and suffix == PROGRAM:
        parser.error(f"--opset is of ONNX, and --output is {args.output}")
    if args.opset is not None and args.opset < 1:
        parser.error(f"--opset is a number of ONNX, such as {OPSET}")
    if args.size and min(args.size) < 1:
        parser.error("--size takes two sides of at least 1 px")
    if args.tolerance is not None and not args.tolerance > 0:
        parser.error("--tolerance is above 0")


def publication(args: argparse.Namespace) -> Publication:
    """The publisher's part of a model card, from the command line."""
    return Publication(args.license, tuple(args.datasets or ()), args.base_model, args.push_to_hub)
