"""SparK: sparse and hierarchical masked pretraining of convnets."""

from spark.model import SparK, SparKOutput

__all__ = ["SparK", "SparKOutput"]
