"""SparK: sparse and hierarchical masked pretraining of convnets."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark.model.spark import SparK, SparKOutput
    from spark.training.checkpoint import load_encoder, load_official, save_encoder

__all__ = ["SparK", "SparKOutput", "load_encoder", "load_official", "save_encoder"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: what only lists or decodes images does not wait for timm."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        import_module("spark.model.spark" if name.startswith("SparK") else "spark.training.checkpoint"), name
    )
