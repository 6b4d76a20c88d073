"""What every depth loss declares: which of the model's outputs it scores, and what it needs from the data."""

import torch
from torch import Tensor, nn

from spark.errors import UserError


class NoGroundTruth(UserError):
    """A batch has too little ground truth for its loss to be defined.

    A loss of zero would look like a perfect prediction, so losses raise this instead; the caller decides what a batch
    without ground truth means to it. A sum of losses leaves the term out (`WeightedLoss`), and `finetune/depth.py`
    skips a micro-batch in which no term is defined, counts it, and gives up beyond a share.
    """


class DepthLoss(nn.Module):
    """Base of all losses: a scalar from one output of the model and one target of the batch, in fp32 or wider.

    `forward(prediction, *targets)` leaves autocast, widens bf16 and fp16 to fp32 (fp64 stays), and calls `score`.
    What is outside the ground truth gets a gradient of exactly zero whatever it holds, NaN included; a NaN where there
    is ground truth comes out as NaN, never as 0.
    """

    predicts: str = "depth"
    """Name in `finetune.losses.targets.OUTPUTS` of the output that is scored."""

    needs: str = "depth"
    """Name in `finetune.losses.targets.TARGETS` of what it is compared with."""

    def forward(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            prediction: What the model says, [B, C, H, W].
            targets: The tensors of the target, as `TARGETS` lists them.

        Raises:
            NoGroundTruth: Too little of the batch has a ground truth.
            ValueError: The shapes do not go together, or the target is not what it should be.
        """
        with torch.autocast(prediction.device.type, enabled=False):
            return self.score(at_least_fp32(prediction), *targets)

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """The loss itself; the prediction is fp32 or fp64."""
        raise NotImplementedError


def at_least_fp32(values: Tensor) -> Tensor:
    """The values in fp32, or in fp64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def check_maps(prediction: Tensor, target: Tensor, valid: Tensor) -> None:
    """Refuse maps of different shapes and masks that are not boolean."""
    if not prediction.shape == target.shape == valid.shape:
        raise UserError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and valid {tuple(valid.shape)} "
            "must have one shape, [B, 1, H, W]: resize the prediction to the ground truth before the loss."
        )
    if valid.dtype != torch.bool:
        raise UserError(f"valid must be a bool mask, got {valid.dtype}: pass `target > 0` or similar.")
