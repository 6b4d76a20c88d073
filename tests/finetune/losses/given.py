"""Losses of given predictions and targets, as a model and a batch would bring them."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from finetune.heads.output import DepthOutput
from finetune.losses.base import DepthLoss
from finetune.losses.segmentation import Segmentation

PLAIN: Any = SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3)
"""A model whose images are not normalised."""


class SegmentationOfLogits(Segmentation):
    """Scores logits that are there, without a decoder."""

    prediction = DepthLoss.prediction


def output_of(name: str, prediction: Tensor) -> DepthOutput:
    """An output whose map of this name is the prediction."""
    name = "disparity_affine" if name == "disparity" else name
    if name in ("depth", "disparity_affine"):
        return DepthOutput(**{name: prediction})
    return DepthOutput(extras={name: prediction})


def of(loss: DepthLoss, prediction: Tensor, *targets: Tensor) -> Tensor:
    """The loss, where the targets are the first group of what it needs."""
    batch = dict(zip(loss.needs[0], targets, strict=True))
    return loss(output_of(loss.predicts, prediction), batch, PLAIN)
