"""Transfer of an encoder to depth estimation: model, losses, data, protocols, training, evaluation, prediction."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.heads.output import DepthOutput
    from finetune.model.depth_model import DepthModel, load_depth_model

    depth: Any  # the module, which can be called

__all__ = ["DepthModel", "DepthOutput", "depth", "load_depth_model"]
_HOMES = {
    "DepthModel": "finetune.model.depth_model",
    "DepthOutput": "finetune.heads.output",
    "depth": "finetune.depth",
    "load_depth_model": "finetune.model.depth_model",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: the options of a command need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if name == "depth" else getattr(home, name)
