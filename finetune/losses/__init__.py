"""Depth losses by name, one file a family, and their weighted sum.

Every loss says which output of the model it scores (`predicts`) and what it needs of the data (`needs`); both are names
in `finetune.losses.targets`. To add one: write it as a `DepthLoss` (or `MaskedLoss`, for a formula over valid pixels)
in a file of this folder and name it in `LOSSES`.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.construct import construct
from finetune.heads.output import DepthOutput
from finetune.losses.affine import GradientMatching, ScaleShiftInvariant
from finetune.losses.base import DepthLoss, NoGroundTruth
from finetune.losses.masked import MaskedLoss
from finetune.losses.pointwise import L1, MSE, BerHu
from finetune.losses.ranking import PairwiseRanking
from finetune.losses.segmentation import Segmentation
from finetune.losses.silog import SILog
from finetune.losses.structure import SSIM, Smoothness
from finetune.losses.targets import OUTPUTS, TARGETS, supplies
from spark.errors import UserError

__all__ = [
    "L1",
    "LOSSES",
    "MSE",
    "SSIM",
    "BerHu",
    "DepthLoss",
    "GradientMatching",
    "MaskedLoss",
    "NoGroundTruth",
    "PairwiseRanking",
    "SILog",
    "ScaleShiftInvariant",
    "Segmentation",
    "Smoothness",
    "WeightedLoss",
    "nothing",
]

LOSSES: Mapping[str, type[DepthLoss]] = MappingProxyType(
    {
        "silog": SILog,
        "l1": L1,
        "mse": MSE,
        "berhu": BerHu,
        "ssi": ScaleShiftInvariant,
        "gradient": GradientMatching,
        "ranking": PairwiseRanking,
        "ssim": SSIM,
        "smoothness": Smoothness,
        "segmentation": Segmentation,
    }
)
"""Name in a configuration -> class; the arguments of its constructor are its options."""


def nothing(output: DepthOutput) -> Tensor:
    """Zero with a gradient of exactly zero for every parameter behind the output, NaN in it or not.

    Processes that average gradients wait for each parameter, also for one that no term of a batch reaches.
    """
    maps = (output.depth, output.disparity_affine, output.segmentation)
    return torch.stack([value.flatten()[:0].sum().float() for value in maps if value is not None]).sum()


class WeightedLoss(nn.Module):
    """Weighted sum of named losses: `WeightedLoss({"silog": 1.0, "l1": 0.1}, {"silog": {"variance_focus": 0.5}})`.

    Args:
        weights: Loss name -> weight, at least one, each positive.
        options: Loss name -> arguments of that loss, for those in `weights` only.
        mean: Of each channel, as the images of the batches were normalised: losses see colours in [0, 1].
        std: Likewise.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        options = options or {}
        if not weights:
            raise UserError(f"no loss is named: give at least one of {', '.join(LOSSES)} with a weight.")
        for name, weight in weights.items():
            if weight <= 0:
                raise UserError(
                    f"the weight of loss {name!r} must be positive, got {weight}: leave it out to drop it."
                )
        for name in options:
            if name not in weights:
                raise UserError(
                    f"options are given for loss {name!r}, which is not among {', '.join(weights)}."
                )
        self.weights = dict(weights)
        self.losses = nn.ModuleDict(
            {name: construct("loss", LOSSES, name, options.get(name, {})) for name in self.weights}
        )
        self.mean, self.std = tuple(mean), tuple(std)

    @property
    def segmentation(self) -> Segmentation | None:
        """The loss that a training-only decoder is needed for, if it is among them."""
        return cast(Segmentation, self.losses["segmentation"]) if "segmentation" in self.losses else None

    @property
    def entries(self) -> set[str]:
        """Names of all entries of a batch that a term can use."""
        return {
            name
            for loss in self._terms().values()
            for names in TARGETS[loss.needs].alternatives
            for name in names
        }

    def check(self, outputs: Collection[str], entries: Collection[str]) -> None:
        """Refuse a model or data that a term cannot work with.

        Args:
            outputs: Names of what the model's head gives.
            entries: What batches have, those of all data sets together.

        Raises:
            ValueError: The first term that lacks something, and what.
        """
        for name, loss in self._terms().items():
            given = {*outputs, *(["disparity"] if {"depth", "disparity_affine"} & set(outputs) else [])}
            if loss.predicts != "segmentation" and loss.predicts not in given:
                ranked = ", or rank what it gives (loss_options.ranking.output)" if name == "ranking" else ""
                raise UserError(
                    f"loss {name!r} scores {loss.predicts}, and the head gives {', '.join(outputs)}: choose another"
                    f" loss or another head{ranked}"
                )
            if not supplies(loss.needs, entries):
                wanted = " or ".join(" and ".join(names) for names in TARGETS[loss.needs].alternatives)
                asked = " (classes are read with data.labels 13 or 40)" if loss.needs == "labels" else ""
                raise UserError(
                    f"loss {name!r} needs {wanted} of the data, which has only {', '.join(sorted(entries))}: name data"
                    f" that has it{asked}, or leave the loss out"
                )

    def forward(self, output: DepthOutput, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the terms that are defined, and each of them unweighted and detached, by name.

        A term without ground truth in this batch adds nothing, has no gradient, and is not among the parts: in mixed
        training, a batch has the targets of one data set.

        Args:
            output: What the model says.
            batch: Targets, with the entries that `finetune.depth_data.sample` lists.

        Raises:
            NoGroundTruth: No term is defined.
            ValueError: The model lacks what a term scores.
        """
        parts: dict[str, Tensor] = {}
        empty: list[str] = []
        for name, loss in self._terms().items():
            prediction = OUTPUTS[loss.predicts](output)
            if prediction is None:
                raise UserError(f"loss {name!r} scores {loss.predicts}, which the model does not give")
            if not supplies(loss.needs, batch):
                empty.append(f"{type(loss).__name__} needs {loss.needs}, which this batch has not")
                continue
            targets = TARGETS[loss.needs].read(batch)
            if loss.needs == "image":
                targets = (self._colours(targets[0]),)
            try:
                parts[name] = loss(prediction, *targets)
            except NoGroundTruth as error:
                empty.append(str(error))
        if not parts:
            raise NoGroundTruth("; ".join(empty))
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return total + nothing(output), {name: part.detach() for name, part in parts.items()}

    def _terms(self) -> dict[str, DepthLoss]:
        return cast(dict[str, DepthLoss], dict(self.losses.items()))

    def _colours(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return images * std + mean
