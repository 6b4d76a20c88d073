"""The weighted sum of named losses."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.construct import construct
from finetune.depth_data.base import DepthSet
from finetune.heads.output import DepthOutput
from finetune.losses import LOSSES
from finetune.losses.base import DepthLoss, NoGroundTruth
from finetune.model.depth_model import DepthModel
from spark.errors import UserError


class WeightedLoss(nn.Module):
    """Weighted sum of named losses: `WeightedLoss({"silog": 1.0, "l1": 0.1}, {"silog": {"variance_focus": 0.5}})`.

    Args:
        weights: Loss name -> weight, at least one, each positive.
        options: Loss name -> arguments of that loss, for those in `weights` only.
    """

    def __init__(
        self, weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None
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
        self.losses = nn.ModuleDict()
        for name in weights:
            loss: DepthLoss = construct("loss", LOSSES, name, options.get(name, {}))
            loss.name = name
            self.losses[name] = loss

    @property
    def terms(self) -> dict[str, DepthLoss]:
        """The losses by name."""
        return cast(dict[str, DepthLoss], dict(self.losses.items()))

    @property
    def entries(self) -> set[str]:
        """Names of all entries of a batch that the model or a loss can use."""
        return {
            "image",
            *(name for loss in self.terms.values() for names in loss.needs for name in names),
        }

    def attach(self, model: DepthModel) -> None:
        """Make the modules that losses train, for this model; draws their weights from torch's global generator."""
        for loss in self.terms.values():
            loss.attach(model)

    def check(self, entries: Collection[str], sets: Sequence[DepthSet] = ()) -> None:
        """Refuse data that a loss cannot work with.

        Args:
            entries: What batches have, those of all data sets together.
            sets: The data sets.
        """
        for loss in self.terms.values():
            loss.check(entries, sets)

    def forward(
        self, output: DepthOutput, batch: Mapping[str, Tensor], model: DepthModel
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the terms that are defined, and each of them unweighted and detached, by name.

        A term without ground truth in this batch adds nothing, has a gradient of zero, and is not among the parts: in
        mixed training, a batch has the targets of one data set.

        Args:
            output: What the model returned.
            batch: Targets, as `finetune.depth_data.sample` lists them.
            model: The model.
        """
        parts: dict[str, Tensor] = {}
        empty: list[str] = []
        for name, loss in self.terms.items():
            try:
                parts[name] = loss(output, batch, model)
            except NoGroundTruth as error:
                empty.append(str(error))
        if not parts:
            raise NoGroundTruth("; ".join(empty))
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return total + self.nothing(output), {name: part.detach() for name, part in parts.items()}

    def nothing(self, output: DepthOutput) -> Tensor:
        """Zero, with a gradient of exactly zero for what a loss may score of `output` and for all parameters of losses.

        Processes that average gradients wait for each parameter, also for one that no term of a batch reaches. Maps on
        the way to others, such as the scales of a core, are left out: zeros of their size would cost memory.
        """
        names = dict.fromkeys(("depth", "disparity_affine", *(loss.predicts for loss in self.terms.values())))
        maps = [value for name in names if name != "disparity" and (value := output.get(name)) is not None]
        return torch.stack([torch.atleast_1d(v)[:0].sum().float() for v in (*maps, *self.parameters())]).sum()
