"""SparK: sparse and hierarchical masked pretraining of convnets."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark.model.spark import SparK, SparKOutput
    from spark.weights.encoder import load_encoder, save_encoder
    from spark.weights.official import load_official

    __version__: str
    pretrain: Any  # the module, which can be called

__all__ = ["SparK", "SparKOutput", "load_encoder", "load_official", "pretrain", "save_encoder"]
_HOMES = {
    "SparK": "spark.model.spark",
    "SparKOutput": "spark.model.spark",
    "load_encoder": "spark.weights.encoder",
    "load_official": "spark.weights.official",
    "pretrain": "spark.pretrain",
    "save_encoder": "spark.weights.encoder",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: the options of a command need no torch."""
    if name == "__version__":
        try:
            return version("spark-pretrain")
        except PackageNotFoundError:  # a clone that was not installed
            return "unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if name == "pretrain" else getattr(home, name)
