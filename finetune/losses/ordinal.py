"""Ordinal regression: for every threshold of depth, whether the truth exceeds it (DORN)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from finetune.heads.dorn import LOGITS, Discretisation, log_odds
from finetune.heads.output import DepthOutput
from finetune.losses.base import DepthLoss, NoGroundTruth
from spark.errors import UserError

if TYPE_CHECKING:
    from finetune.model.depth_model import DepthModel


class OrdinalRegression(DepthLoss):
    """Negative log-likelihood of all K answers of a pixel, mean over the valid pixels of the batch.

    A pixel whose depth is at least threshold k answers that one with "at least", the others with "nearer". Source: Fu
    et al. 2018 (arXiv 1806.02446, equations 2 and 3). Logits are brought to the size of the images first.
    """

    predicts = LOGITS

    thresholds: Tensor

    def attach(self, model: "DepthModel") -> None:
        """Take over the thresholds of the head."""
        super().attach(model)
        bins = getattr(model.head, "bins", None)
        assert isinstance(bins, Discretisation), f"head {model.head_name} gives {LOGITS} and no bins"
        self.register_buffer("thresholds", bins.thresholds(), persistent=False)

    def prediction(self, output: DepthOutput, batch: Mapping[str, Tensor], model: "DepthModel") -> Tensor:
        """Log-odds [B, K, H, W]; to subtract before resizing is the same and half the work."""
        height, width = batch["depth"].shape[-2:]
        return model.to_frame(log_odds(super().prediction(output, batch, model)), (height, width))

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Compare log-odds with depth.

        Args:
            prediction: Log-odds [B, K, H, W] that depth is at least threshold k.
            targets: Ground truth [B, 1, H, W] [m], and where there is any, bool [B, 1, H, W].
        """
        target, valid = targets
        if target.shape != valid.shape or prediction.shape[::2] != (len(target), target.shape[2]):
            raise UserError(
                f"log-odds {list(prediction.shape)}, target {list(target.shape)} and valid {list(valid.shape)} do not"
                " go together: expected [B, K, H, W] and twice [B, 1, H, W]."
            )
        if not valid.any():
            raise NoGroundTruth(
                f"{type(self).__name__} needs a pixel with a ground truth, and this batch of {len(valid)} has none:"
                " check the depth files and the depth limits"
            )
        odds = prediction.movedim(1, -1)[valid[:, 0]]
        exceeded = target[valid][:, None] >= self.thresholds
        losses = F.binary_cross_entropy_with_logits(odds, exceeded.to(odds.dtype), reduction="none")
        return losses.sum(1).mean()
