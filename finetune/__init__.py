"""Transfer of an encoder to depth estimation: model, losses, data, protocols, training, evaluation, prediction."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.heads.output import DepthOutput
    from finetune.model.depth_model import DepthModel, load_depth_model

__all__ = ["DepthModel", "DepthOutput", "load_depth_model"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: the options of a command need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        import_module("finetune.heads.output" if name == "DepthOutput" else "finetune.model.depth_model"),
        name,
    )
