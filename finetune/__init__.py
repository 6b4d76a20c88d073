"""Transfer of an encoder to depth estimation: model, losses, data, protocols, training, evaluation, prediction."""

from finetune.heads.output import DepthOutput
from finetune.model.depth_model import DepthModel, load_depth_model

__all__ = ["DepthModel", "DepthOutput", "load_depth_model"]
