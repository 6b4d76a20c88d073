"""SparK: sparse and hierarchical masked pretraining of convnets."""

from spark.checkpoint import load_encoder, load_official, save_encoder
from spark.model import SparK, SparKOutput

__all__ = ["SparK", "SparKOutput", "load_encoder", "load_official", "save_encoder"]
