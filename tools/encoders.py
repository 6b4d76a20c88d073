"""Which of timm's convnets can SparK pretrain?  Try a small member of every family, and write the table.

    python -m tools.encoders --write                        # writes docs/use/encoders.csv and docs/use/encoders.md
    python -m tools.encoders --families resnet convnextv2   # prints only
    python -m tools.encoders --models my_nets:TinyNet       # a convnet of your own, or any name of timm

The families are those of docs/use/encoders.csv, from its first two columns. The tests try the same properties
(`CHECKS`).

Every family has to show six properties, in fp64, with random weights in every norm and gain:

- dense: with all patches visible, features, gradients and running statistics are those of the stock timm model;
- no leak: what lies under masked patches changes nothing (NaN there, in fact);
- zero: features are 0 at masked sites, and not only there;
- independent: two masks whose forwards interleave do not disturb each other;
- packed: the packed layout equals the masked one in features, gradients and running statistics;
- trains: SparK around it gives a finite loss and gradients (fp32).

An encoder that has no rule for one of its operators is refused by a sentence that names the operator and the module.
"""

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from spark import SparK
from spark.files import write_whole
from spark.model.encoder import PyramidLevel, build_encoder, pyramid, pyramid_info
from spark.model.masking import random_visible
from spark.sparse import sparsify
from spark.sparse.tensor import MissingRuleError
from tools.benchmarks.contenders import lively
from tools.benchmarks.rows import rows_as_csv

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "use" / "encoders.csv"
_TOLERANCE = 1e-8  # relative, of fp64, to the largest value of a tensor


class Trial(NamedTuple):
    """Result of one family.

    Attributes:
        family, name: of the family and its member.
        parameters: of the encoder; 0 where it could not be made.
        strides: of its feature maps [px].
        patch_size: of the mask, smallest multiple of the last stride that works [px].
        held: the properties that it showed.
        refusal: what it was refused with, or how a property failed; "" if all hold.
    """

    family: str
    name: str
    parameters: int = 0
    strides: tuple[int, ...] = ()
    patch_size: int = 0
    held: tuple[str, ...] = ()
    refusal: str = ""


class Subject(NamedTuple):
    """An encoder with what its properties are tried on.

    Attributes:
        encoder: timm's model in fp64, in training mode.
        levels: of its pyramid.
        patch_size: [px].
        images: [2, 3, 2 p, 3 p] of patch size p, fp64.
        visible: [2, 1, 2, 3], three patches of each image.
    """

    encoder: nn.Module
    levels: list[PyramidLevel]
    patch_size: int
    images: Tensor
    visible: Tensor

    @classmethod
    def of(cls, encoder: nn.Module, patches: int = 1) -> "Subject":
        """An encoder with random weights in every norm and gain and without dropout, and images of 2 x 3 mask patches.

        Args:
            encoder: timm's model.
            patches: side of a mask patch over the model's stride.

        Raises:
            ValueError: it has no pyramid.
        """
        encoder = lively(encoder).double()
        for module in encoder.modules():  # noise would differ from forward to forward
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        levels = pyramid_info(encoder)
        side = patches * levels[-1].stride
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, 2 * side, 3 * side, dtype=torch.float64, generator=generator)
        return cls(encoder, levels, side, images, random_visible(2, (2, 3), 0.5, generator=generator))

    def sparse(self, encoder: nn.Module, images: Tensor, visible: Tensor, layout: str) -> list[Tensor]:
        """Feature maps as dense arrays."""
        return [x.to_dense() for x in pyramid(encoder, sparsify(images, visible, layout), self.levels)]


class Outcome(NamedTuple):
    """What two ways of computing are compared in: feature maps, gradients, buffers."""

    features: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def outcome(encoder: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> Outcome:
    """Of a forward and a backward on a copy of the encoder, every feature weighted by its own random number."""
    encoder = copy.deepcopy(encoder)
    features = run(encoder)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in features]
    torch.autograd.backward(features, weights)
    gradients = {key: p.grad for key, p in encoder.named_parameters() if p.grad is not None}
    return Outcome([x.detach() for x in features], gradients, dict(encoder.named_buffers()))


def require_same(one: Outcome, other: Outcome) -> None:
    """Raise AssertionError, with a sentence, where two outcomes differ by more than rounding.

    A parameter whose true gradient is 0, such as a bias before a norm, is held to the largest gradient.
    """
    for level, (a, b) in enumerate(zip(one.features, other.features, strict=True)):
        _require_close(f"feature map {level}", a, b)
    assert one.gradients.keys() == other.gradients.keys(), "other parameters get a gradient"
    largest = max(float(g.abs().max()) for g in other.gradients.values())
    for key, gradient in one.gradients.items():
        _require_close(f"the gradient of {key}", gradient, other.gradients[key], 1e-4 * largest)
    for key, buffer in one.buffers.items():
        if buffer.is_floating_point():
            _require_close(key, buffer, other.buffers[key])


def _require_close(what: str, a: Tensor, b: Tensor, floor: float = 1e-300) -> None:
    error = float((a - b).abs().max() / b.abs().max().clamp(min=floor))
    assert error <= _TOLERANCE, f"{what} differs by {error:.1e} (relative)"


def check_dense(s: Subject) -> None:
    """All visible equals timm's model, in training and in evaluation mode, in both layouts."""
    everything = torch.ones_like(s.visible)
    for training in (True, False):
        encoder = copy.deepcopy(s.encoder).train(training)
        expected = outcome(encoder, lambda e: pyramid(e, s.images, s.levels))
        for layout in ("masked", "packed"):
            require_same(
                outcome(encoder, lambda e, on=layout: s.sparse(e, s.images, everything, on)), expected
            )


def check_no_leak(s: Subject) -> None:
    """NaN under the mask changes nothing, bit by bit."""
    seen = s.visible.repeat_interleave(s.patch_size, 2).repeat_interleave(s.patch_size, 3)
    spoilt = s.images.where(seen, float("nan"))
    for layout in ("masked", "packed"):
        expected, found = (
            s.sparse(copy.deepcopy(s.encoder), images, s.visible, layout) for images in (s.images, spoilt)
        )
        for level, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(a, b), f"feature map {level} sees masked pixels ({layout})"


def check_zero(s: Subject) -> None:
    """Masked sites of every feature map are 0, visible ones are not all."""
    for layout in ("masked", "packed"):
        for level, x in enumerate(s.sparse(copy.deepcopy(s.encoder), s.images, s.visible, layout)):
            mask = nn.functional.interpolate(s.visible.double(), size=x.shape[2:]).bool().expand_as(x)
            assert (x[~mask] == 0).all(), f"feature map {level} is not 0 where it is masked ({layout})"
            assert (x[mask] != 0).any(), f"feature map {level} is 0 everywhere ({layout})"


def check_independent(s: Subject) -> None:
    """A second forward, on another mask and size, between a forward and its backward."""
    encoder = copy.deepcopy(s.encoder).eval()
    other, visible = s.images.transpose(2, 3), s.visible.logical_not().transpose(2, 3)
    for layout in ("masked", "packed"):
        alone = [*s.sparse(encoder, s.images, s.visible, layout), *s.sparse(encoder, other, visible, layout)]
        first, second = sparsify(s.images, s.visible, layout), sparsify(other, visible, layout)
        together = [x.to_dense() for sparse in (first, second) for x in pyramid(encoder, sparse, s.levels)]
        torch.autograd.backward([x.square().sum() for x in together])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a, b), f"another mask disturbs a forward ({layout})"


def check_packed(s: Subject) -> None:
    """Packed equals masked, in training and in evaluation mode, images with unequal numbers of visible patches."""
    visible = s.visible.clone()
    visible[0, 0] = torch.tensor([[True, False, False], [False, False, False]])
    for training in (True, False):
        encoder = copy.deepcopy(s.encoder).train(training)
        masked, packed = (
            outcome(encoder, lambda e, on=layout: s.sparse(e, s.images, visible, on))
            for layout in ("masked", "packed")
        )
        require_same(packed, masked)


def check_trains(s: Subject) -> None:
    """SparK around it: finite loss and gradients, in fp32."""
    size = s.images.shape[2], s.images.shape[3]
    model = SparK(copy.deepcopy(s.encoder).float(), size, 0.5, patch_size=s.patch_size, decoder_width=64)
    model(s.images.float(), s.visible).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients), "a gradient is missing or not finite"


CHECKS: dict[str, Callable[[Subject], None]] = {
    "dense": check_dense,
    "no leak": check_no_leak,
    "zero": check_zero,
    "independent": check_independent,
    "packed": check_packed,
    "trains": check_trains,
}
PROPERTIES = tuple(CHECKS)


def families(path: Path = TABLE) -> dict[str, str]:
    """Family -> a small member of it, timm's name; those of the table, to which a new family is added by hand."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["family"]: row["member"] for row in csv.DictReader(file)}


def try_family(family: str, name: str) -> Trial:
    """All properties of a family, with mask patches of its stride, or else of twice that."""
    trial = Trial(family, name)
    for patches in (1, 2):
        try:
            torch.manual_seed(0)
            subject = Subject.of(build_encoder(name), patches)
        except (ValueError, AssertionError) as error:
            return trial._replace(refusal=_sentence(error))
        trial = trial._replace(
            parameters=sum(p.numel() for p in subject.encoder.parameters()),
            strides=tuple(level.stride for level in subject.levels),
            patch_size=subject.patch_size,
            held=(),
            refusal="",
        )
        for what, check in CHECKS.items():
            try:
                check(subject)
            except (MissingRuleError, ValueError, AssertionError, RuntimeError, TypeError) as error:
                trial = trial._replace(refusal=trial.refusal or _sentence(error))
            else:
                trial = trial._replace(held=(*trial.held, what))
        if not trial.refusal:
            return trial
    return trial


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def rows_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row a family: yes or no for every property."""
    return [
        {
            "family": trial.family,
            "member": trial.name,
            "supported": "no" if trial.refusal else "yes",
            "parameters": trial.parameters,
            "strides": " ".join(map(str, trial.strides)),
            "patch_size": trial.patch_size,
            **{what: "yes" if what in trial.held else "no" for what in PROPERTIES},
            "refusal": trial.refusal,
            "timm": timm.__version__,
            "torch": torch.__version__,
        }
        for trial in trials
    ]


def markdown(trials: Sequence[Trial]) -> str:
    """The page: families that are supported, and those that are not with the sentence that they are refused with."""
    good, bad = ([t for t in trials if bool(t.refusal) == refused] for refused in (False, True))
    supported = [
        f"| {t.family} | `{t.name}` | {t.parameters / 1e6:.1f} M | {', '.join(map(str, t.strides))} | "
        f"{t.patch_size} |"
        for t in good
    ]
    refused = [
        f"| {t.family} | `{t.name}` | {', '.join(t.held) or 'none'} | {_cell(t.refusal)} |" for t in bad
    ]
    return _PAGE.format(
        timm=timm.__version__,
        torch=torch.__version__,
        good=len(good),
        bad=len(bad),
        supported="\n".join(supported),
        refused="\n".join(refused),
        untried=", ".join(f"`{module}`" for module in untried(t.name for t in trials)),
    )


_PAGE = """\
# Encoders

Any timm convnet with a feature pyramid whose operators have a rule can be pretrained. This page was written by
`python -m tools.encoders --write`, which tries a small member of each family. The rest of a
family runs on the same operators; a model that does not is refused by name before anything is written.

With timm {timm} and PyTorch {torch}, **{good} families pass** all properties: all visible equals timm's model, masked
pixels leak nothing, masked outputs are zero, interleaved masks are independent, packed equals masked, and SparK around
it trains. In fp64 but for the last, in training and evaluation mode, gradients and running statistics included.

| family | tried | parameters | strides [px] | smallest mask patch [px] |
|---|---|---|---|---|
{supported}

**{bad} are refused**, with the sentence beside them. Attention over the grid, and convolutions whose padding lets
feature maps of odd sizes arise, have no meaning on the visible patches alone.

| family | tried | properties that hold | refused with |
|---|---|---|---|
{refused}

No member of these modules of timm was tried (transformers and MLPs without a convolutional pyramid, mostly): {untried}.
"""


def _cell(text: str) -> str:
    """Text that breaks no table."""
    return text.replace("|", "\\|")


def untried(members: Iterable[str]) -> list[str]:
    """Modules of timm.models with no member among those."""

    def module_of(name: str) -> str:
        return timm.model_entrypoint(name).__module__.split(".")[-1]

    tried = {module_of(name) for name in members}
    return sorted({module_of(name) for name in timm.list_models()} - tried)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the families one after the other; write the table at the end."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="encoders", description=__doc__, formatter_class=formatter)
    known = families()
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--families", nargs="+", choices=list(known), metavar="FAMILY", help="default: all of them"
    )
    what.add_argument(
        "--models", nargs="+", metavar="NAME", help="timm names, or package.module:factory of your own"
    )
    what.add_argument("--write", action="store_true", help="write the table, of all families")
    options = parser.parse_args(arguments)
    tried = {name: name for name in options.models or ()} or {
        family: name for family, name in known.items() if family in (options.families or known)
    }
    trials = []
    for family, name in tried.items():
        begin = time.perf_counter()
        trial = try_family(family, name)
        trials.append(trial)
        verdict = "supported" if not trial.refusal else f"{', '.join(trial.held) or 'none'} | {trial.refusal}"
        print(f"{family:50s} {name:32s} {time.perf_counter() - begin:5.1f} s  {verdict}", flush=True)
    print(f"{sum(not trial.refusal for trial in trials)} of {len(trials)} are supported")
    if options.write:
        write_whole(TABLE, rows_as_csv(rows_of(trials)).encode())
        write_whole(TABLE.with_suffix(".md"), markdown(trials).encode())


if __name__ == "__main__":
    main()
