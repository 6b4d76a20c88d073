"""Transfer of an encoder to depth, classification and segmentation: from data to predictions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.heads.output import DepthOutput
    from finetune.model.depth_model import DepthModel, load_depth_model
    from finetune.model.segmentation_model import SegmentationModel, load_segmentation_model

    classify: Any  # the modules, which can be called
    depth: Any
    segment: Any

__all__ = [
    "DepthModel",
    "DepthOutput",
    "SegmentationModel",
    "classify",
    "depth",
    "load_depth_model",
    "load_segmentation_model",
    "segment",
]
_HOMES = {
    "DepthModel": "finetune.model.depth_model",
    "DepthOutput": "finetune.heads.output",
    "SegmentationModel": "finetune.model.segmentation_model",
    "classify": "finetune.classify",
    "depth": "finetune.depth",
    "load_depth_model": "finetune.model.depth_model",
    "load_segmentation_model": "finetune.model.segmentation_model",
    "segment": "finetune.segment",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: the options of a command need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
