"""What spark-export-depth does, once its options are read."""

from pathlib import Path

from finetune.model.depth_model import DepthModel, load_depth_model
from finetune.model.graph import DepthGraph, describe
from finetune.options import ExportDepthConfig
from finetune.report.card import DEPTH_MARK, depth_card
from spark.commands.work.export import publication
from spark.errors import UserError
from spark.report.card import NOT_RECORDED, read_record
from spark.weights.graph import OPSET, PROGRAM, TOLERANCE, Sizes, write_graph
from spark.weights.hub import PREFIX, push


def export(config: ExportDepthConfig) -> None:
    """Read the model, write what is asked for, say what it is."""
    model = load_depth_model(
        config.model if config.model.startswith(PREFIX) else Path(config.model), config.encoder_name
    )
    output = Path(config.output)
    if config.is_graph:
        write_depth_graph(model, config, output)
        return
    source = Path(config.model)
    folder = model.save(
        output, depth_card(model, source, [Path(file) for file in config.results or ()], publication(config))
    )
    print(f'written; load it with: finetune.load_depth_model("{folder}")')
    if config.push_to_hub:
        print(f"uploaded to {push(folder, config.push_to_hub, config.private)}")


def write_depth_graph(model: DepthModel, config: ExportDepthConfig, output: Path) -> None:
    """Write the model as a graph, and say how near it is to PyTorch."""
    onnx = output.suffix.lower() != PROGRAM
    fit = model.image_size if onnx and config.resize != "none" else None
    if onnx and config.resize != "none" and fit is None:
        raise UserError(
            f"{config.model} does not record the image_size that it was trained at, so images cannot be brought to it:"
            " use --resize none, and give the graph images of a suitable size"
        )
    fixed = config.size
    graph = DepthGraph(model, fit, pad=onnx or fixed is not None)
    usual = fixed or model.image_size or (8 * model.stride, 10 * model.stride)
    # photos are larger than what models are trained at, and are shrunk inside: both ways up, and of other proportions
    photos = [] if fit is None else [(3 * max(fit) + 1, 2 * max(fit) + 3), (2 * max(fit) - 1, 3 * max(fit))]
    run = None if config.model.startswith(PREFIX) else read_record(config.model, DEPTH_MARK)
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
        opset=config.opset or OPSET,
        tolerance=config.tolerance or TOLERANCE,
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
