"""RGB-D data on disk -> samples in metres -> augmented batches."""

from finetune.depth_data.base import DepthSet, OpenOptions
from finetune.depth_data.labels import LabelOptions
from finetune.depth_data.mixing import MixedSampler, MixedSet, TrainingMix
from finetune.depth_data.registry import KINDS, Kind, open_depth_data, recognise
from finetune.depth_data.sample import DepthFileError, DepthSample, read_depth_mm, read_rgb
from finetune.depth_data.sets.nyu import NYULabeled, NYUSync, paint_border
from finetune.depth_data.transforms import DepthTrainingSet, EvalTransform, TrainTransform, collate_depth

__all__ = [
    "KINDS",
    "DepthFileError",
    "DepthSample",
    "DepthSet",
    "DepthTrainingSet",
    "EvalTransform",
    "Kind",
    "LabelOptions",
    "MixedSampler",
    "MixedSet",
    "NYULabeled",
    "NYUSync",
    "OpenOptions",
    "TrainTransform",
    "TrainingMix",
    "collate_depth",
    "open_depth_data",
    "paint_border",
    "read_depth_mm",
    "read_rgb",
    "recognise",
]
