"""Which of timm's convnets can SparK pretrain?  Try a small member of every family, and write the table.

    python tools/encoder_support.py --results docs/encoders           # writes docs/encoders.csv and docs/encoders.md
    python tools/encoder_support.py --families resnet convnextv2       # prints only

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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from spark import SparK
from spark.files import write_whole
from spark.model.encoder import PyramidLevel, build_encoder, pyramid, pyramid_info
from spark.model.masking import random_visible
from spark.sparse import MissingRuleError, sparsify
from tools.benchmarks.contenders import lively
from tools.benchmarks.rows import rows_as_csv

FAMILIES = {
    "resnet": "resnet10t",
    "resnet-d": "resnet26d",
    "resnet, group norm": "resnet50_gn",
    "resnet, anti-aliased": "resnetblur50",
    "resnext": "resnext26ts",
    "wide_resnet": "wide_resnet50_2",
    "resnetv2 (batch norm)": "resnetv2_18",
    "resnetv2 (BiT: group norm, standardised weights)": "resnetv2_50x1_bit",
    "seresnet": "seresnet33ts",
    "seresnext": "seresnext26d_32x4d",
    "senet": "legacy_seresnet18",
    "ecaresnet": "ecaresnet26t",
    "skresnet": "skresnet18",
    "resnest": "resnest14d",
    "res2net": "res2net50_14w_8s",
    "res2next": "res2next50",
    "resnetrs": "resnetrs50",
    "gcresnet": "gcresnet50t",
    "batresnext": "bat_resnext26ts",
    "regnetx": "regnetx_002",
    "regnety": "regnety_002",
    "regnetz": "regnetz_005",
    "convnext": "convnext_atto",
    "convnextv2": "convnextv2_atto",
    "inceptionnext": "inception_next_atto",
    "mambaout": "mambaout_femto",
    "efficientnet": "efficientnet_b0",
    "efficientnet, TensorFlow padding": "tf_efficientnet_b0",
    "efficientnet_lite": "efficientnet_lite0",
    "efficientnetv2": "efficientnetv2_rw_t",
    "efficientnetv2, TensorFlow padding": "tf_efficientnetv2_b0",
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_035",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv4": "mobilenetv4_conv_small",
    "mobilenetv4, hybrid": "mobilenetv4_hybrid_medium",
    "mobilenetv5": "mobilenetv5_base",
    "mobilenet_edgetpu": "mobilenet_edgetpu_v2_xs",
    "mnasnet": "mnasnet_small",
    "spnasnet": "spnasnet_100",
    "fbnet": "fbnetc_100",
    "fbnetv3": "fbnetv3_b",
    "mixnet": "mixnet_s",
    "tinynet": "tinynet_e",
    "lcnet": "lcnet_035",
    "lcnetv2": "lcnetv2_small",
    "hardcorenas": "hardcorenas_b",
    "rexnet": "rexnet_100",
    "ghostnet": "ghostnet_050",
    "ghostnetv2": "ghostnetv2_100",
    "repghostnet": "repghostnet_050",
    "fastvit": "fastvit_t8",
    "repvit": "repvit_m1",
    "repvgg": "repvgg_a0",
    "mobileone": "mobileone_s1",
    "gernet": "gernet_s",
    "fasternet": "fasternet_t0",
    "starnet": "starnet_s050",
    "densenet": "densenet121",
    "rdnet": "rdnet_tiny",
    "dla": "dla46x_c",
    "hrnet": "hrnet_w18_small",
    "vgg": "vgg11",
    "vgg, batch norm": "vgg11_bn",
    "darknet": "darknet53",
    "cs3darknet": "cs3darknet_focus_s",
    "cspresnet": "cspresnet50",
    "cspnext": "cspnext_tiny",
    "dpn": "dpn48b",
    "vovnet": "ese_vovnet19b_slim_dw",
    "hgnet": "hgnet_tiny",
    "hgnetv2": "hgnetv2_b0",
    "selecsls": "selecsls42",
    "xception (aligned)": "xception41p",
    "xception": "legacy_xception",
    "nf_regnet": "nf_regnet_b0",
    "nfnet": "dm_nfnet_f0",
    "eca_nfnet": "eca_nfnet_l0",
    "poolformer": "poolformer_s12",
    "poolformerv2": "poolformerv2_s12",
    "convformer": "convformer_s18",
    "focalnet": "focalnet_tiny_srf",
    "tresnet": "tresnet_m",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "inception_resnet_v2": "inception_resnet_v2",
    "nasnet": "nasnetalarge",
    "pnasnet": "pnasnet5large",
    "convmixer": "convmixer_768_32",
    "edgenext": "edgenext_xx_small",
    "mobilevit": "mobilevit_xxs",
    "efficientvit": "efficientvit_b0",
    "efficientformerv2": "efficientformerv2_s0",
    "nextvit": "nextvit_small",
    "caformer": "caformer_s18",
    "swiftformer": "swiftformer_xs",
    "shvit": "shvit_s1",
    "iformer": "iformer_t",
    "efficientvim": "efficientvim_m1",
    "lowformer": "lowformer_b0",
    "cpubone": "cpubone_nano",
    "csatv2": "csatv2",
    "visformer": "visformer_tiny",
    "sequencer2d": "sequencer2d_s",
    "tiny_vit": "tiny_vit_5m_224",
    "halonet": "halonet_h1",
    "lambda_resnet": "lambda_resnet26t",
    "coatnet": "coatnet_nano_rw_224",
    "maxvit": "maxvit_pico_rw_256",
    "pvt_v2": "pvt_v2_b0",
    "swin": "swin_tiny_patch4_window7_224",
    "vit": "vit_tiny_patch16_224",
}
"""Family -> a small member of it, timm's name."""

PROPERTIES = ("dense", "no leak", "zero", "independent", "packed", "trains")
_TOLERANCE = 1e-8  # relative, of fp64, to the largest value of a tensor (of all gradients, for gradients)


class Trial(NamedTuple):
    """Result of one family.

    Attributes:
        family, name: as in `FAMILIES`.
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

    def sparse(self, encoder: nn.Module, images: Tensor, visible: Tensor, layout: str) -> list[Tensor]:
        """Feature maps as dense arrays."""
        return [x.to_dense() for x in pyramid(encoder, sparsify(images, visible, layout), self.levels)]


class Outcome(NamedTuple):
    """What two ways of computing are compared in: feature maps, gradients, buffers."""

    features: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def subject_of(name: str, patches: int) -> Subject:
    """A model with lively weights and without dropout, and images of 2 x 3 mask patches.

    Args:
        name: timm's, or "package.module:factory" of one's own.
        patches: side of a mask patch over the model's stride.

    Raises:
        ValueError: it cannot be made, or has no pyramid.
    """
    torch.manual_seed(0)
    encoder = lively(build_encoder(name)).double()
    for module in encoder.modules():  # noise would differ from forward to forward
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    levels = pyramid_info(encoder)
    side = patches * levels[-1].stride
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 2 * side, 3 * side, dtype=torch.float64, generator=generator)
    return Subject(encoder, levels, side, images, random_visible(2, (2, 3), 0.5, generator=generator))


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
    """Raise AssertionError, with a sentence, where two outcomes differ by more than rounding."""
    for level, (a, b) in enumerate(zip(one.features, other.features, strict=True)):
        _require_close(f"feature map {level}", a, b, b.abs().max())
    assert one.gradients.keys() == other.gradients.keys(), "other parameters get a gradient"
    largest = torch.stack([g.abs().max() for g in other.gradients.values()]).max()
    for key, gradient in one.gradients.items():
        _require_close(f"the gradient of {key}", gradient, other.gradients[key], largest)
    for key, buffer in one.buffers.items():
        if buffer.is_floating_point():
            _require_close(key, buffer, other.buffers[key], other.buffers[key].abs().max())


def _require_close(what: str, a: Tensor, b: Tensor, scale: Tensor) -> None:
    error = (a - b).abs().max() / scale.clamp(min=1e-300)
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


def try_family(family: str, name: str) -> Trial:
    """All properties of a family, with mask patches of its stride, or else of twice that."""
    trial = Trial(family, name)
    for patches in (1, 2):
        try:
            subject = subject_of(name, patches)
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
        untried=", ".join(f"`{module}`" for module in untried()),
    )


_PAGE = """\
# Encoders

Any timm convnet with a feature pyramid whose operators have a rule can be pretrained. This page was written by
`python tools/encoder_support.py --results docs/encoders`, which tries a small member of each family. The rest of a
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


def untried() -> list[str]:
    """Modules of timm.models with no member among the families."""

    def module_of(name: str) -> str:
        return timm.model_entrypoint(name).__module__.split(".")[-1]

    tried = {module_of(name) for name in FAMILIES.values()}
    return sorted({module_of(name) for name in timm.list_models()} - tried)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the families one after the other, telling as it goes; write the table at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", nargs="+", choices=list(FAMILIES), metavar="FAMILY", help="default: all of them"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="try these in place of the families: timm names, or package.module:factory of your own",
    )
    parser.add_argument(
        "--results", type=Path, help="RESULTS: .csv and .md are added; only with all families"
    )
    options = parser.parse_args(arguments)
    if options.results and (options.families or options.models):
        parser.error("--results is a table of all families: leave --families and --models out")
    if options.models and options.families:
        parser.error("--models takes the place of --families: leave one of them out")
    tried = {name: name for name in options.models or ()} or {
        family: name for family, name in FAMILIES.items() if family in (options.families or FAMILIES)
    }
    trials = []
    for family, name in tried.items():
        begin = time.perf_counter()
        trial = try_family(family, name)
        trials.append(trial)
        verdict = "supported" if not trial.refusal else f"{', '.join(trial.held) or 'none'} | {trial.refusal}"
        print(f"{family:50s} {name:32s} {time.perf_counter() - begin:5.1f} s  {verdict}", flush=True)
    supported = sum(not trial.refusal for trial in trials)
    print(f"{supported} of {len(trials)} {'models' if options.models else 'families'} are supported")
    if options.results:
        write_whole(options.results.with_suffix(".csv"), rows_as_csv(rows_of(trials)).encode())
        write_whole(options.results.with_suffix(".md"), markdown(trials).encode())


if __name__ == "__main__":
    main()
