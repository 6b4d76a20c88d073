"""Hand out a depth model: an ONNX or torch.export file for other runtimes, or a folder for the Hugging Face hub.

    python finetune/commands/export.py --model RUN/model --output depth.onnx
    python finetune/commands/export.py --model RUN/model --output FOLDER --push_to_hub OWNER/NAME

FILE.onnx and FILE.pt2 take RGB images, uint8 [B, 3, H, W], and give depth in metres, float32 [B, 1, H, W], at the size
of the image; normalisation, padding and calibration are inside (docs/export.md). A file is written only if it computes
what PyTorch does. A FOLDER gets config.json, model.safetensors and README.md, a model card from the run's own files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune.model.depth_model import DepthModel, load_depth_model
from finetune.model.graph import DepthGraph, describe
from finetune.report.card import DEPTH_MARK, depth_card
from spark.commands.export_options import add_export_options, check_options, option_parser, publication
from spark.errors import UserError, one_line_errors
from spark.report.card import NOT_RECORDED, read_record
from spark.weights.graph import OPSET, PROGRAM, TOLERANCE, Sizes, is_graph, write_graph
from spark.weights.hub import PREFIX, push


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder of a depth model, such as OUTPUT_DIR/model of a training run, or hf-hub:OWNER/NAME",
    )
    parser.add_argument(
        "--encoder_name",
        metavar="NAME",
        help="package.module:factory of the model's encoder where that is a convnet of your own",
    )
    parser.add_argument(
        "--resize",
        choices=["fitted", "none"],
        help="fitted: images of any size are brought to the size that the model was trained at inside, as predict.py "
        "does, and depth back to theirs (default of .onnx); none: the network sees images as they are (.pt2)",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="results.json of finetune/evaluate.py on this model, for the model card of a folder; the evaluation.json "
        "of its run is there anyway",
    )
    add_export_options(parser)
    args = parser.parse_args(argv)
    check_options(parser, args)
    if is_graph(args.output) and args.results:
        parser.error(f"--results is for the card of a folder, and --output is {args.output}")
    if not is_graph(args.output) and args.resize:
        parser.error(f"--resize is for FILE.onnx, and --output is {args.output}")
    if args.resize == "fitted" and Path(args.output).suffix.lower() == PROGRAM:
        parser.error("a .pt2 file cannot resize images of any size: leave --resize out, or write FILE.onnx")
    return args


def export(args: argparse.Namespace) -> None:
    """Read the model, write what is asked for, say what it is."""
    model = load_depth_model(
        args.model if args.model.startswith(PREFIX) else Path(args.model).expanduser(), args.encoder_name
    )
    output = Path(args.output).expanduser()
    if is_graph(output):
        write_depth_graph(model, args, output)
        return
    source = Path(args.model).expanduser()
    folder = model.save(output, depth_card(model, source, args.results, publication(args)))
    print(f'written; load it with: finetune.load_depth_model("{folder}")')
    if args.push_to_hub:
        print(f"uploaded to {push(folder, args.push_to_hub, args.private)}")


def write_depth_graph(model: DepthModel, args: argparse.Namespace, output: Path) -> None:
    """Write the model as a graph, and say how near it is to PyTorch."""
    onnx = output.suffix.lower() != PROGRAM
    fit = model.image_size if onnx and args.resize != "none" else None
    if onnx and args.resize != "none" and fit is None:
        raise UserError(
            f"{args.model} does not record the image_size that it was trained at, so images cannot be brought to it:"
            " use --resize none, and give the graph images of a suitable size"
        )
    fixed = None if args.size is None else (args.size[0], args.size[1])
    graph = DepthGraph(model, fit, pad=onnx or fixed is not None)
    usual = fixed or model.image_size or (8 * model.stride, 10 * model.stride)
    # photos are larger than what models are trained at, and are shrunk inside: both ways up, and of other proportions
    photos = [] if fit is None else [(3 * max(fit) + 1, 2 * max(fit) + 3), (2 * max(fit) - 1, 3 * max(fit))]
    run = None if args.model.startswith(PREFIX) else read_record(args.model, DEPTH_MARK)
    protocol = NOT_RECORDED if run is None else str(run.option("protocol"))
    metadata = describe(model, fit, protocol)
    if not onnx and fixed is None:
        print("torch.export works out which sizes it takes, which can last long; it does not with --size H W")
    difference = write_graph(
        graph,
        graph.reference,
        output,
        outputs=graph.outputs,
        sizes=Sizes(model.stride, fixed, usual, photos),
        metadata=metadata,
        opset=args.opset or OPSET,
        tolerance=args.tolerance or TOLERANCE,
    )
    print(
        f"written to {output}; {metadata['output']}, {metadata['unit']}; off from PyTorch by at most {difference:.1g}"
        " of the largest value"
    )
    if fit is None and model.image_size is not None and model.image_size != fixed:
        height, width = model.image_size
        print(
            f"images are seen as they are: bring them to about {height}x{width} px, which it was trained at"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one sentence and exit code 2."""
    args = parse_args(argv)
    with one_line_errors():
        export(args)


if __name__ == "__main__":
    main()
