"""SparK's original code, out of a clone of github.com/keyu-tian/SparK, in this process and unchanged.

Nothing of it is copied here. Its modules are top-level files (`encoder`, `decoder`, `models`, `utils`, and a `spark` of
the name of ours) written for timm 0.5, and importing them changes timm for everybody. So while they are imported, and
only then, `sys.modules` holds:

- `models`: a bare package over the clone's folder; its `__init__` only registers factories and changes `extra_repr`s;
- `utils.misc`: `is_pow2n`, the one function used here (the real module wants pytz, tensorboard and a process group);
- `timm.models.layers`: today's `timm.layers`;
- `timm.models.registry`: a `register_model` that leaves timm's own models in their place;
- `timm.models.resnet`: a subclass of timm's `ResNet`, for the clone to override methods of, so that timm's stays whole.

Afterwards `sys.modules` and `sys.path` are as before. There is no drop path and no SyncBatchNorm, in ours neither.
"""

import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import timm.layers
import timm.models.resnet
from torch import Tensor, nn

from spark.errors import UserError

_FILES = ("spark.py", "encoder.py", "decoder.py", "models/convnext.py", "models/resnet.py")
_OWN = ("encoder", "decoder", "models", "utils")
_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
_RESNET = re.compile(r"resnet(18|34|50|101|152|200)")


@dataclass(frozen=True)
class Original:
    """The modules of a clone that make a SparK."""

    spark: ModuleType
    encoder: ModuleType
    decoder: ModuleType
    convnext: ModuleType
    resnet: ModuleType


def has_model(name: str) -> bool:
    """Whether the original's families hold this timm name."""
    return name in _CONVNEXTS or _RESNET.fullmatch(name) is not None


def commit_of(path: Path) -> str:
    """Commit of a checkout, "+" behind it where code differs from it; "unknown" for a copy without git."""
    if not (path / ".git").exists():  # git would name the repository around it
        return "unknown"
    git, folders = ["git", "-C", str(path)], ("pretrain", "spark", "finetune")
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", *folders], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()[:12] + "+" * bool(changes.stdout.strip())


def import_original(path: Path) -> Original:
    """Import the original from a clone.

    Raises:
        ValueError: no clone of SparK there, or one that does not import.
    """
    folder = path / "pretrain"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{path} is no clone of github.com/keyu-tian/SparK: it has no pretrain/{missing[0]}; "
            "run `git clone https://github.com/keyu-tian/SparK` and name the folder that it makes"
        )
    spec = importlib.util.spec_from_file_location("original_spark", folder / "spark.py")
    assert spec is not None
    assert spec.loader is not None
    try:
        with _adapted_imports(folder):
            modules = [
                importlib.import_module(name)
                for name in ("encoder", "decoder", "models.convnext", "models.resnet")
            ]
            spark = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(spark)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"the original in {path} does not import: {error}") from error
    return Original(spark, *modules)


@contextlib.contextmanager
def _adapted_imports(folder: Path) -> Iterator[None]:
    """`sys.path` and `sys.modules` as the module docstring says; both restored at the end, whatever happened."""
    stubs = {
        "models": _module("models", __path__=[str(folder / "models")]),
        "utils": _module("utils", __path__=[]),
        "utils.misc": _module("utils.misc", is_pow2n=lambda x: x > 0 and x & (x - 1) == 0),
        "timm.models.layers": timm.layers,
        "timm.models.registry": _module("timm.models.registry", register_model=lambda function: function),
        "timm.models.resnet": _module(
            "timm.models.resnet", ResNet=type("ResNet", (timm.models.resnet.ResNet,), {})
        ),
    }

    def ours(name: str) -> bool:
        return name in stubs or name.split(".")[0] in _OWN

    before, path = {name: module for name, module in sys.modules.items() if ours(name)}, list(sys.path)
    for name in before:
        del sys.modules[name]
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def build_original(original: Original, name: str, size: tuple[int, int], mask_ratio: float) -> nn.Module:
    """The original's SparK around an encoder of its families, with random weights.

    Args:
        original: the imported clone.
        name: a timm name for which `has_model` holds.
        size: [px], (H, W); the original knows squares only.
        mask_ratio: share of masked patches.

    Raises:
        ValueError: the size is no square.
    """
    if size[0] != size[1]:
        raise UserError(
            f"the original takes square images only, not {size[0]}x{size[1]}: name one --size, "
            "or leave --official out"
        )
    if name in _CONVNEXTS:
        cnn, norm = getattr(original.convnext, name)(sparse=True, num_classes=0), "ln"
    else:
        cnn, norm = timm.create_model(name, num_classes=0, global_pool=""), "bn"
        cnn.__class__ = original.resnet.ResNet  # the clone's methods, on the network that its factory makes
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own structure
        encoder = original.encoder.SparseEncoder(cnn, input_size=size[0], sbn=False)
        decoder = original.decoder.LightDecoder(encoder.downsample_raito, width=768, sbn=False)
        return original.spark.SparK(encoder, decoder, mask_ratio=mask_ratio, densify_norm=norm, sbn=False)


def original_features(original: Original, model: Any, images: Tensor, visible: Tensor) -> list[Tensor]:
    """The original encoder's feature maps of masked images, shallow first: what its SparK does before densifying."""
    original.encoder._cur_active = visible  # type: ignore[attr-defined]
    seen = visible.repeat_interleave(model.downsample_raito, 2).repeat_interleave(model.downsample_raito, 3)
    return model.sparse_encoder(images * seen)
