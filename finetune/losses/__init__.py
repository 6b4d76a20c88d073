"""Depth losses by name, one file a family, and their weighted sum.

Every loss is called as `loss(prediction, target, valid)` on [B, 1, H, W] maps and returns a scalar. To add one: write
it as a `MaskedLoss` in a file of this folder and name it in `LOSSES`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from finetune.losses.masked import MaskedLoss, NoGroundTruth
from finetune.losses.pointwise import L1, MSE, BerHu
from finetune.losses.silog import SILog
from finetune.registry import construct

__all__ = ["L1", "LOSSES", "MSE", "BerHu", "MaskedLoss", "NoGroundTruth", "SILog", "WeightedLoss"]

LOSSES: Mapping[str, type[MaskedLoss]] = MappingProxyType(
    {"silog": SILog, "l1": L1, "mse": MSE, "berhu": BerHu}
)
"""Name in a configuration -> class; the arguments of its constructor are its options."""


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
            raise ValueError(f"no loss is named: give at least one of {', '.join(LOSSES)} with a weight.")
        for name, weight in weights.items():
            if weight <= 0:
                raise ValueError(
                    f"the weight of loss {name!r} must be positive, got {weight}: leave it out to drop it."
                )
        for name in options:
            if name not in weights:
                raise ValueError(
                    f"options are given for loss {name!r}, which is not among {', '.join(weights)}."
                )
        self.weights = dict(weights)
        self.losses = nn.ModuleDict(
            {name: construct("loss", LOSSES, name, options.get(name, {})) for name in self.weights}
        )

    def forward(self, prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and each unweighted part detached, by name; arguments: `MaskedLoss.forward`."""
        parts = {name: loss(prediction, target, valid) for name, loss in self.losses.items()}
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}
