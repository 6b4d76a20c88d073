"""A network as a graph for other runtimes: ONNX, or a torch.export program; written only if it computes the same.

The graph takes pixels: uint8 [B, C, H, W] of 1 or 3 channels, 0 to 255, RGB. Normalisation, padding to what the network
needs and, for whole images, resizing are inside. `write_graph` exports, runs what it exported on several sizes and
batches beside PyTorch, and writes the file only if the results agree.
"""

import contextlib
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark.errors import UserError
from spark.files import write_whole
from spark.model.encoder import pyramid, pyramid_info
from spark.model.normalise import Normalise

ONNX, PROGRAM = ".onnx", ".pt2"
OPSET = 17
"""Has LayerNormalization, and every torch from 2.4 on writes it."""

TOLERANCE = 1e-4
"""Largest difference that a graph may have, as a share of the largest value. fp32 in another order of operations is off
by 1e-7 to 1e-5 here, anything forgotten by far more."""

IMAGE = "image"
"""Name of the input."""

Network = Callable[[Tensor], Sequence[Tensor]]


def is_graph(path: str | Path) -> bool:
    """Whether a file of this name is to be a graph."""
    return Path(path).suffix.lower() in (ONNX, PROGRAM)


@dataclass(frozen=True)
class Sizes:
    """Image sizes that a graph takes; the batch size is always free.

    Args:
        stride: That the network needs sides to be multiples of [px].
        fixed: (H, W) of all images [px]; None: any. A torch.export program then takes multiples of the stride from two
            strides on, for it states what it takes as a formula.
        usual: (H, W) that images have in use [px], the first that is tried.
        further: Other (H, W) that are tried [px], where any are taken: for what the sizes near the stride do not reach,
            such as the shrinking of photos inside.
    """

    stride: int
    fixed: tuple[int, int] | None
    usual: tuple[int, int]
    further: Sequence[tuple[int, int]] = ()

    def example(self, kind: str) -> tuple[int, int]:
        """(H, W) of the example that is traced."""
        return self._allowed(kind, [self.usual])[0]

    def probes(self, kind: str) -> list[tuple[int, int, int]]:
        """(B, H, W) of the images of the comparison: the example's, odd, upright, wide, small, other batches."""
        if self.fixed:
            return [(2, *self.fixed), (1, *self.fixed), (3, *self.fixed)]
        s, (height, width) = self.stride, self.example(kind)
        sizes = [(height, width), (2 * s + 1, 3 * s - 5), (3 * s - 3, 2 * s), (2 * s, 4 * s), (s - 3, s + 1)]
        probes = [
            (batch, *size) for batch, size in zip((2, 1, 3, 1, 3), self._allowed(kind, sizes), strict=True)
        ]
        return probes + [(1, *size) for size in self._allowed(kind, self.further)]

    def _allowed(self, kind: str, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        if self.fixed:
            return [self.fixed for _ in sizes]
        if kind == ONNX:
            return list(sizes)
        up = [[max(2, -(-side // self.stride)) * self.stride for side in size] for size in sizes]
        return [(height, width) for height, width in up]


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Repeat the last row and column of [B, C, H, W] until both sides are multiples of `stride` [px].

    The same as `torch.nn.functional.pad(mode="replicate")`, through indices, which any runtime computes at any size.
    """
    height, width = images.shape[-2:]
    rows = torch.arange((height + stride - 1) // stride * stride).clamp(max=height - 1)
    columns = torch.arange((width + stride - 1) // stride * stride).clamp(max=width - 1)
    return images[:, :, rows][:, :, :, columns]


class EncoderGraph(nn.Module):
    """An encoder's feature maps, of pixels; the encoder is in evaluation mode from here on.

    Args:
        encoder: As `spark.load_encoder` gives it.
        mean: Of each channel, on the scale 0 to 1.
        std: Likewise.
        pad: Sides may be other than multiples of the stride, and are padded.
    """

    def __init__(
        self, encoder: nn.Module, mean: Sequence[float], std: Sequence[float], pad: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.levels = pyramid_info(encoder)
        self.normalise = Normalise(mean, std)
        self.pad = pad
        self.eval()

    @property
    def outputs(self) -> dict[str, str]:
        """Name of each feature map, and the suffix of "height" and "width" in the names of its axes."""
        return {f"stride_{level.stride}": f"_{level.stride}" for level in self.levels}

    @property
    def stride(self) -> int:
        """Of the deepest map [px]."""
        return self.levels[-1].stride

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps [B, C_i, ceil(H / s) s / s_i, ceil(W / s) s / s_i], shallow first, s the deepest stride."""
        x = self.normalise(image)
        return tuple(pyramid(self.encoder, pad_to_stride(x, self.stride) if self.pad else x, self.levels))

    def reference(self, image: Tensor) -> list[Tensor]:
        """The same without what only the graph needs."""
        x, s = self.normalise(image), self.stride
        padding = (0, -image.shape[-1] % s, 0, -image.shape[-2] % s)
        return list(pyramid(self.encoder, F.pad(x, padding, mode="replicate"), self.levels))


def write_graph(
    network: nn.Module,
    reference: Network,
    path: str | Path,
    *,
    outputs: Mapping[str, str],
    sizes: Sizes,
    channels: int = 3,
    metadata: Mapping[str, Any],
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
) -> float:
    """Export a network of pixels, compare it with PyTorch, and write the file if both agree.

    Args:
        network: From `image`, uint8 [B, C, H, W] (float32 where C is not 1 or 3), to a tuple of tensors; on the CPU.
        reference: Computes the expected outputs of the same images.
        path: FILE.onnx or FILE.pt2.
        outputs: Name of each output, and the suffix of "height" and "width" in the names of its axes.
        sizes: Image sizes that the graph takes.
        channels: C.
        metadata: Put into the file, with `input`, `largest_difference` and `tolerance`.
        opset: Of ONNX.
        tolerance: Largest difference, as a share of the largest value of an output.

    Returns:
        The largest difference that was found.

    Raises:
        UserError: It cannot be exported, or computes something else; nothing is written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, and a {path.suffix} file was to be written there: choose another name"
        )
    kind = path.suffix.lower()
    eight_bit = channels in (1, 3)
    generator = torch.Generator().manual_seed(0)

    def images(batch: int, height: int, width: int) -> Tensor:
        pixels = torch.randint(
            0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator
        )
        return pixels if eight_bit else pixels / 255

    example = images(2, *sizes.example(kind))
    exported = (
        _Onnx(network, example, outputs, sizes, opset) if kind == ONNX else _Program(network, example, sizes)
    )
    largest = 0.0
    for shape in sizes.probes(kind):
        probe = images(*shape)
        with torch.no_grad():
            wanted = reference(probe)
        difference, reason = _difference(exported.run, probe, wanted)
        if not difference <= tolerance:  # NaN is not
            raise UserError(
                _refusal(
                    path, shape, difference, reason, tolerance, sizes, first=probe.shape == example.shape
                )
            )
        largest = max(largest, difference)
    pixels = "uint8, 0 to 255" if eight_bit else "float32, on the scale 0 to 1"
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    about = {
        **metadata,
        "input": f"{IMAGE}: {colours} [B, {channels}, H, W], {pixels}",
        "largest_difference": largest,
        "tolerance": tolerance,
    }
    write_whole(path, exported.content(about))
    return largest


def _difference(run: Network, probe: Tensor, wanted: Sequence[Tensor]) -> tuple[float, str]:
    """Largest difference as a share of the largest value, over all outputs, and a description of it."""
    try:
        got = run(probe)
    except Exception as error:  # every runtime has its own kinds
        return float("inf"), f"it does not run: {_first_line(error)}"
    if len(got) != len(wanted):
        return float("inf"), f"it has {len(got)} outputs and not {len(wanted)}"
    largest = 0.0
    for one, other in zip(got, wanted, strict=True):
        if one.shape != other.shape:
            return float("inf"), f"an output has shape {list(one.shape)} and not {list(other.shape)}"
        share = float(
            (one - other).abs().max() / other.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        )
        if not share <= largest:
            largest = share
    return largest, f"it is off by {largest:.2g} of the largest value"


def _refusal(
    path: Path,
    shape: tuple[int, int, int],
    difference: float,
    reason: str,
    tolerance: float,
    sizes: Sizes,
    first: bool,
) -> str:
    batch, height, width = shape
    what = f"{path} was not written: on {batch} images of {height}x{width} px {reason}"
    if not first and sizes.fixed is None:
        return (
            f"{what}, where the size that was traced agrees. Something in this network takes its size for a constant: "
            f"fix it, such as with --size {sizes.usual[0]} {sizes.usual[1]}"
        )
    more = f", or accept more than {tolerance:g} with --tolerance" if difference < float("inf") else ""
    return f"{what}, so this network cannot be handed out in this form: use the folder with PyTorch{more}"


class _Onnx:
    """Export through TorchScript, and run it by onnxruntime; why not through torch.export: docs/log.md."""

    def __init__(
        self, network: nn.Module, example: Tensor, outputs: Mapping[str, str], sizes: Sizes, opset: int
    ) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"a graph of ONNX needs the packages onnx and onnxruntime ({error}): install them with"
                " pip install 'spark-pretrain[onnx]', or write a .pt2 file, which needs neither"
            ) from error
        axes = {name: {0: "batch"} for name in (IMAGE, *outputs)}
        if sizes.fixed is None:
            for name, end in {IMAGE: "", **outputs}.items():
                axes[name] |= {2: f"height{end}", 3: f"width{end}"}
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            _silence(),
            torch.no_grad(),
        ):
            warnings.simplefilter(
                "ignore"
            )  # of tracing: the outputs are compared below; of deprecation: see the log
            file = str(Path(folder) / "graph.onnx")
            try:
                torch.onnx.export(
                    _with_weights(network),
                    (example,),
                    file,
                    dynamo=False,
                    opset_version=opset,
                    input_names=[IMAGE],
                    output_names=list(outputs),
                    dynamic_axes=axes,
                )
            except (
                Exception
            ) as error:  # torch's own kinds, RuntimeError, ValueError, KeyError, as the operator has it
                newer = f"--opset {OPSET}" if opset != OPSET else "a newer --opset, up to 20"
                raise UserError(
                    f"ONNX opset {opset} cannot express this network ({_first_line(error)}): use {newer}, another head"
                    " or encoder, or a .pt2 file"
                ) from error
            self._model = onnx.load(file)
        onnx.checker.check_model(self._model)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 4  # failures show in the comparison
        try:
            self._session = onnxruntime.InferenceSession(
                self._model.SerializeToString(), quiet, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} cannot read the graph in opset {opset} ({_first_line(error)}):"
                f" use --opset {OPSET}, or a newer onnxruntime"
            ) from error

    def run(self, image: Tensor) -> list[Tensor]:
        return [
            torch.from_numpy(np.asarray(value)) for value in self._session.run(None, {IMAGE: image.numpy()})
        ]

    def content(self, about: Mapping[str, Any]) -> bytes:
        import onnx

        onnx.helper.set_model_props(self._model, {key: _text(value) for key, value in about.items()})
        return self._model.SerializeToString()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output: torch prints the whole graph, from C++, where an export fails."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _with_weights(network: nn.Module) -> nn.Module:
    """A copy whose batch norms all have weights: the exporter wants these, or channels that it does not always know."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is None:
            module.weight = nn.Parameter(torch.ones(module.num_features))
            module.bias = nn.Parameter(torch.zeros(module.num_features))
    return network


class _Program:
    """Export through torch.export, and run what comes back from the file."""

    def __init__(self, network: nn.Module, example: Tensor, sizes: Sizes) -> None:
        sides: dict[int, Any] = {}
        if sizes.fixed is None:
            sides = {
                2: sizes.stride * torch.export.Dim("rows", min=2),
                3: sizes.stride * torch.export.Dim("columns", min=2),
            }
        shapes = ({0: torch.export.Dim("batch"), **sides},)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                self._program = torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
            except Exception as error:  # the operators raise many kinds
                free = (
                    ""
                    if sizes.fixed
                    else f", or fix the size, such as with --size {sizes.usual[0]} {sizes.usual[1]}"
                )
                raise UserError(
                    f"torch.export cannot express this network ({_first_line(error)}): write a {ONNX} file{free}"
                ) from error
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph.pt2"
            torch.export.save(self._program, file)
            self._module = torch.export.load(file).module()

    def run(self, image: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(self._module(image))

    def content(self, about: Mapping[str, Any]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph.pt2"
            text = json.dumps({key: _text(value) for key, value in about.items()})
            torch.export.save(self._program, file, extra_files={"metadata.json": text})
            return file.read_bytes()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
