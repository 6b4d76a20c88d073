"""Who is compared: SparK in its layouts, and the original, on equal weights and one mask.

Shapes: images [B, 3, H, W], visible [B, 1, fh, fw] bool, True = seen; feature maps [B, C, h, w], shallow first.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark import SparK
from spark.errors import UserError
from spark.model.encoder import pyramid
from spark.model.masking import mean_ratio, num_visible, random_visible
from spark.sparse import sparsify
from spark.weights.official import load_official
from tools.benchmarks.original import (
    Original,
    build_original,
    has_model,
    import_original,
    original_features,
)

_COMPILED = ", compiled"


class Decoder(NamedTuple):
    """`decoder_width`, `decoder_stages` (None: up to the image's resolution) and `densify_kernel` of SparK."""

    width: int = 768
    stages: int | None = None
    kernel: int = 3

    @classmethod
    def parse(cls, text: str) -> "Decoder":
        """From WIDTH or WIDTH/STAGES/KERNEL, as `str` writes it."""
        try:
            numbers = [int(part) for part in text.split("/")]
            if len(numbers) not in (1, 3) or min(numbers) < 1:
                raise UserError(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no decoder: write WIDTH, such as 256, or WIDTH/STAGES/KERNEL, such as 256/4/1"
            ) from error
        return cls(*numbers)

    def __str__(self) -> str:
        return str(self.width) if self.stages is None else f"{self.width}/{self.stages}/{self.kernel}"

    @property
    def options(self) -> dict[str, Any]:
        """As SparK and the config name them."""
        return {
            "decoder_width": self.width,
            "decoder_stages": self.stages,
            "densify_kernel": self.kernel,
        }


ORIGINAL_DECODER = Decoder()
"""That of the original; what all its released weights have."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: timm name of the encoder.
        batch: images of a step.
        size: [px], (H, W).
        mask_ratio: share of masked patches.
        decoder: of ours.
        precision: "fp32" (on CUDA with PyTorch's defaults, so TF32 convolutions) or "bf16" (autocast).
        device: torch's name of it.
        channels_last: memory format of the original and its images; ours always are in channels_last, as training
            has them.
        threads: of a CPU, for each process.
        official: folder of a clone of the original, or None.
        original_precision: of the original, where it is another than `precision`.
        layouts: of ours, "masked" first.
        compiled: those of `layouts` that take part through `torch.compile`, too.
        processes: that train together, each on a batch; the batch statistics of ours are then over all of them.
    """

    model: str
    batch: int = 16
    size: tuple[int, int] = (224, 224)
    mask_ratio: float = 0.6
    decoder: Decoder = ORIGINAL_DECODER
    precision: str = "fp32"
    device: str = "cpu"
    channels_last: bool = False
    threads: int = 1
    official: Path | None = None
    original_precision: str | None = None
    layouts: tuple[str, ...] = ("masked", "packed")
    compiled: tuple[str, ...] = ()
    processes: int = 1

    @property
    def has_original(self) -> bool:
        """Whether the original takes part: a clone is named, and its families hold the model."""
        return self.official is not None and has_model(self.model)

    @property
    def names(self) -> list[str]:
        """Of the contenders, the base of all ratios first."""
        return [
            *["original"] * self.has_original,
            *self.layouts,
            *(layout + _COMPILED for layout in self.compiled),
        ]


@dataclass(frozen=True)
class Contender:
    """One implementation of SparK.

    Attributes:
        name: "original", or a layout of ours, with ", compiled" behind it where `torch.compile` takes part.
        model: the whole of it, in training mode.
        decoder: what shapes its decoder.
        precision: in which it is timed, see `Case`.
        channels_last: memory format of its weights and images.
        grid: patches (fh, fw) of an image.
        loss: (images, visible) -> scalar.
        features: (images, visible) -> dense feature maps; for ours that includes `to_dense`, which any reader of
            the features needs.
    """

    name: str
    model: nn.Module
    decoder: Decoder
    precision: str
    channels_last: bool
    grid: tuple[int, int]
    loss: Callable[[Tensor, Tensor], Tensor]
    features: Callable[[Tensor, Tensor], list[Tensor]]


def set_up_torch(case: Case) -> None:
    """Settings of the process, as training has them."""
    torch.set_num_threads(case.threads)
    torch.backends.cudnn.benchmark = True


class Bench:
    """Contenders of a case with the images and the mask that all of them get.

    The images lie in each contender's memory format before its time is taken: moving a batch to the device does that.

    Args:
        case: what is measured.
        only: names of the contenders to build; default all. Only contenders that were built together have equal
            weights.
        seed: of images and mask; weights are always the same.
    """

    def __init__(self, case: Case, only: list[str] | None = None, seed: int = 0):
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        self.contenders = {c.name: c for c in _build(case, case.names if only is None else only)}
        images = torch.randn(case.batch, 3, *case.size, generator=generator)
        self.images = {
            name: images.to(case.device, memory_format=_memory_format(c.channels_last))
            for name, c in self.contenders.items()
        }
        grid = next(iter(self.contenders.values())).grid
        self.visible = random_visible(
            case.batch, grid, case.mask_ratio, generator=generator, device=case.device
        )
        self._cotangents: list[Tensor] = []

    @property
    def visible_share(self) -> float:
        """Visible patches over all patches: 1 - mask_ratio, rounded to whole patches."""
        return self.visible.float().mean().item()

    def forward(self, contender: Contender, kind: str, precision: str | None = None) -> list[Tensor]:
        """[loss] of a "step", or the feature maps of an "encoder", in this precision or the contender's own."""
        case, precision = self.case, precision or contender.precision
        with (
            _explained(contender, case, precision),
            torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            if kind == "step":
                return [contender.loss(self.images[contender.name], self.visible)]
            return contender.features(self.images[contender.name], self.visible)

    def backward(self, contender: Contender, outputs: list[Tensor], precision: str | None = None) -> None:
        """Gradients of the loss, or of the sum of all features, each weighted by its own fixed random number."""
        with _explained(contender, self.case, precision or contender.precision):
            if outputs[0].ndim == 0:
                outputs[0].backward()
                return
            if not self._cotangents:
                generator = torch.Generator().manual_seed(1)
                self._cotangents = [torch.randn(x.shape, generator=generator).to(x.device) for x in outputs]
            torch.autograd.backward(
                outputs, [c.to(x.dtype) for c, x in zip(self._cotangents, outputs, strict=True)]
            )

    def step(self, contender: Contender, kind: str) -> None:
        """What is timed: forward, backward, gradients dropped."""
        self.backward(contender, self.forward(contender, kind))
        contender.model.zero_grad(set_to_none=True)


@contextmanager
def _explained(contender: Contender, case: Case, precision: str) -> Iterator[None]:
    """Failures of what is not our code as a ValueError that says what to leave out; ours stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        if contender.name.endswith(_COMPILED):
            reason = " ".join(str(error).splitlines()[:2]).strip()
            raise UserError(
                f"torch.compile fails on {case.model} ({reason}): leave --compile out; docs/use/compile.md says "
                "what it needs"
            ) from error
        if contender.name != "original":
            raise
        raise UserError(
            f"the original does not run {case.model} in {precision} ({error}): pass --original_precision fp32, "
            "or leave --official out"
        ) from error


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _build(case: Case, names: list[str]) -> list[Contender]:
    """Contenders of these names, with the same lively weights where their decoders are the same."""
    torch.manual_seed(0)
    contenders: list[Contender] = []
    if "original" in names:
        assert case.official is not None
        code = import_original(case.official)
        model = lively(build_original(code, case.model, case.size, case.mask_ratio))
        contenders.append(_original(code, model, case))
    ours: dict[str, SparK] = {}
    for layout in [name for name in names if name in case.layouts]:
        if contenders and case.decoder == ORIGINAL_DECODER:
            ours[layout] = _with_weights_of(contenders[0].model, case, layout)
            continue
        ours[layout] = SparK(
            case.model,
            case.size,
            case.mask_ratio,
            layout=layout,
            sync_bn=case.processes > 1,
            **case.decoder.options,
        )
        first = next(iter(ours.values()))
        if ours[layout] is first:
            lively(first)
        else:
            ours[layout].load_state_dict(first.state_dict())
    contenders += [our_own(model, case) for model in ours.values()]
    for contender in contenders:
        contender.model.to(case.device, memory_format=_memory_format(contender.channels_last)).train()  # type: ignore[call-overload]
    if case.compiled:
        torch.compiler.reset()  # what was traced for another case counts against the limit of recompilations
    return contenders + [_compiled(our_own(ours[x], case)) for x in case.compiled if x + _COMPILED in names]


def _compiled(contender: Contender) -> Contender:
    """The same model, forward and backward through `torch.compile`; a break of its graph is an error."""
    return replace(
        contender,
        name=contender.name + _COMPILED,
        loss=torch.compile(contender.loss, fullgraph=True),
        features=torch.compile(contender.features, fullgraph=True),
    )


def our_own(model: SparK, case: Case, wrapped: nn.Module | None = None) -> Contender:
    """A model of ours as a contender; its loss is computed by `wrapped`, a module around it, where there is one."""
    run = model if wrapped is None else wrapped
    per_image = num_visible(
        model.grid, mean_ratio(model.mask_ratio)
    )  # told, as in training: nothing waits for a GPU

    def features(images: Tensor, visible: Tensor) -> list[Tensor]:
        sparse = sparsify(images, visible, model.layout, model.sync_bn, len(images) * per_image)
        return [x.to_dense() for x in pyramid(model.encoder, sparse, model.levels)]

    return Contender(
        model.layout,
        model,
        case.decoder,
        case.precision,
        True,
        model.grid,
        lambda images, visible: run(images, visible, len(images) * per_image).loss,
        features,
    )


def _original(code: Original, model: Any, case: Case) -> Contender:
    return Contender(
        "original",
        model,
        ORIGINAL_DECODER,
        case.original_precision or case.precision,
        case.channels_last,
        (model.fmap_h, model.fmap_w),
        lambda images, visible: model(images, active_b1ff=visible),
        lambda images, visible: original_features(code, model, images, visible),
    )


def _with_weights_of(original: nn.Module, case: Case, layout: str) -> SparK:
    """Ours, read from a file of the original's weights: the way by which a user's file comes in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "original.pth"
        torch.save(original.state_dict(), path)
        return load_official(
            path,
            layout=layout,
            model_name=case.model,
            input_size=case.size,
            mask_ratio=case.mask_ratio,
            sync_bn=case.processes > 1,
        )


def lively(model: nn.Module) -> nn.Module:
    """Give every vector a value that matters: gammas start at 0 or 1e-6, which hide half of each block from a check."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim <= 1:
                scale = name.endswith(("weight", "gamma", "gain", "scale"))
                p.copy_((0.5 if scale else 0.0) + 0.3 * torch.randn(p.shape, generator=generator))
    return model
