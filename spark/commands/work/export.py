"""What spark-export does, once its options are read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from spark.errors import FileError, UserError
from spark.model.encoder import pyramid_info, timm_config
from spark.options import ExportConfig, ExportOptions
from spark.report.card import (
    NOT_RECORDED,
    PRETRAINING_MARK,
    Publication,
    RunRecord,
    encoder_card,
    public_name,
    read_record,
)
from spark.training.checkpoint import find_run
from spark.weights.encoder import read_encoder, save_encoder
from spark.weights.graph import OPSET, PROGRAM, TOLERANCE, EncoderGraph, Sizes, write_graph
from spark.weights.hub import push


def export(config: ExportConfig) -> None:
    """Read the checkpoint, write encoder or graph, print what happened."""
    source = Path(config.checkpoint)
    if not source.exists():
        raise FileError(f"no checkpoint at {source}: give a run, a checkpoint folder or a .pth file")
    if (source / "checkpoints").is_dir():
        source = find_run(source, str(source)) or source
    encoder, report = read_encoder(source, model_name=config.model_name, averaged=config.ema)
    run = read_record(source, PRETRAINING_MARK) if source.is_dir() else None
    if run is not None and config.ema:
        run = replace(run, averaged=True)
    if config.is_graph:
        write_encoder_graph(encoder, config, str(source), run)
        print(report)
        return
    size = None if config.input_size is None else height_width(config.input_size)

    def card(about: dict[str, Any]) -> str:
        return encoder_card(about, run, str(source), publication(config))

    folder = save_encoder(encoder, Path(config.output), config.mean, config.std, size, card)
    print(report)
    if config.model_name is not None and hasattr(encoder, "own_encoder"):
        print(f'written; load it with: spark.load_encoder("{folder}", model_name="{config.model_name}")')
    else:
        print(f'written; load it with: timm.create_model("local-dir:{folder}", pretrained=True)')
    if config.push_to_hub:
        print(f"uploaded to {push(folder, config.push_to_hub, config.private)}")


def write_encoder_graph(encoder: nn.Module, config: ExportConfig, source: str, run: RunRecord | None) -> None:
    """Write the pyramid of feature maps as a graph, and print how close it is to PyTorch."""
    known = timm_config(encoder)
    mean, std = config.mean or known.get("mean") or (), config.std or known.get("std") or ()
    channels = known["input_size"][0]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise UserError(
                f"the graph normalises its images, and {name} of the {channels} channels is not known: give --{name}"
                f" with {channels} values, as the training images were normalised"
            )
    stride = pyramid_info(encoder)[-1].stride
    fixed = config.size
    onnx = Path(config.output).suffix.lower() != PROGRAM
    graph = EncoderGraph(encoder, mean, std, pad=onnx or fixed is not None)
    usual = height_width(config.input_size or tuple(known["input_size"][1:]))
    difference = write_graph(
        graph,
        graph.reference,
        Path(config.output),
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
        opset=config.opset or OPSET,
        tolerance=config.tolerance or TOLERANCE,
    )
    print(f"written to {config.output}; off from PyTorch by at most {difference:.1g} of the largest value")


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else size


def publication(config: ExportOptions) -> Publication:
    """The publisher's part of a model card, from the options."""
    return Publication(config.license, tuple(config.datasets or ()), config.base_model, config.push_to_hub)
