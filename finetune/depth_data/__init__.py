"""RGB-D data on disk -> samples in metres -> augmented batches."""

from finetune.depth_data.nyu import NYULabeled, NYUSync, paint_border
from finetune.depth_data.opening import open_depth_data
from finetune.depth_data.sample import DepthFileError, DepthSample, read_depth_mm, read_rgb
from finetune.depth_data.transforms import DepthTrainingSet, EvalTransform, TrainTransform, collate_depth

__all__ = [
    "DepthFileError",
    "DepthSample",
    "DepthTrainingSet",
    "EvalTransform",
    "NYULabeled",
    "NYUSync",
    "TrainTransform",
    "collate_depth",
    "open_depth_data",
    "paint_border",
    "read_depth_mm",
    "read_rgb",
]
