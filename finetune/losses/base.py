"""What every depth loss declares: which of the model's outputs it scores, and what it needs from the data."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune.depth_data.base import DepthSet
from finetune.heads.output import DepthOutput, at_least_fp32
from spark.errors import UserError

if TYPE_CHECKING:
    from finetune.model.depth_model import DepthModel


class NoGroundTruth(UserError):
    """A batch has too little ground truth for its loss to be defined.

    A loss of zero would look like a perfect prediction, so losses raise this instead; the caller decides what a batch
    without ground truth means to it. A sum of losses leaves the term out (`WeightedLoss`), and training skips a
    micro-batch in which no term is defined, counts it, and gives up beyond a share.
    """


class DepthLoss(nn.Module):
    """Base of all losses: a scalar from what a model returned and a batch, in fp32 or wider.

    `forward` takes prediction and targets, leaves autocast, widens bf16 and fp16 to fp32 (fp64 stays), and calls
    `score`. What is outside the ground truth gets a gradient of exactly zero whatever it holds, NaN included; a NaN
    where there is ground truth comes out as NaN, never as 0.

    A loss may own modules, which it makes in `attach`: they are trained and saved in checkpoints, and no part of the
    exported model. What they compute goes into `output.extras`, so that all processes pass back through it.
    """

    name: str = ""
    """Its name in a configuration."""

    predicts: str = "depth"
    """What is scored, by its name in `DepthOutput.get`."""

    needs: tuple[tuple[str, ...], ...] = (("depth", "valid"),)
    """Groups of entries of a batch, in the order of preference; one group must be there."""

    def attach(self, model: "DepthModel") -> None:
        """Make own modules for this model.

        Raises:
            UserError: The model does not give what the loss scores, or not so that it can be trained.
        """
        outputs = model.head.outputs
        given = {*outputs, *model.head.extras, "disparity"}
        if self.predicts not in given:
            raise UserError(
                f"loss {self.name!r} scores {self.predicts}, and the head gives {', '.join(outputs)}: choose another"
                f" loss or another head{self.other_output()}"
            )
        source = self.predicts
        if source == "disparity":
            source = "disparity_affine" if "disparity_affine" in outputs else "depth"
        if source in model.head.counted:
            raise UserError(
                f"loss {self.name!r} scores {source}, which head {model.head_name} counts, so that no gradient passes:"
                f" train it by {', '.join(model.head.extras)} (docs/use/depth.md)"
            )

    def check(self, entries: Collection[str], sets: Sequence[DepthSet]) -> None:
        """Refuse data that lacks what the loss needs.

        Args:
            entries: What batches have, those of all data sets together.
            sets: The data sets.

        Raises:
            UserError: Saying what is missing.
        """
        if not any(set(names) <= set(entries) for names in self.needs):
            raise UserError(
                f"loss {self.name!r} needs {self.wanted()} of the data, which has only {', '.join(sorted(entries))}:"
                f" name data that has it{self.other_data()}, or leave the loss out"
            )

    def forward(self, output: DepthOutput, batch: Mapping[str, Tensor], model: "DepthModel") -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            output: What the model returned.
            batch: The targets, by the names in `needs`.
            model: The model.

        Raises:
            NoGroundTruth: Too little of the batch has a ground truth.
            UserError: The shapes do not go together, or the target is not what it should be.
        """
        targets = self.targets(batch, model)
        prediction = self.prediction(output, batch, model)
        with torch.autocast(prediction.device.type, enabled=False):
            return self.score(at_least_fp32(prediction), *targets)

    def targets(self, batch: Mapping[str, Tensor], model: "DepthModel") -> tuple[Tensor, ...]:
        """The first group of `needs` that the batch has, in this order."""
        for names in self.needs:
            if all(name in batch for name in names):
                return tuple(batch[name] for name in names)
        raise NoGroundTruth(f"{type(self).__name__} needs {self.wanted()}, which this batch has not")

    def prediction(self, output: DepthOutput, batch: Mapping[str, Tensor], model: "DepthModel") -> Tensor:
        """What is scored, [B, C, H, W]."""
        found = output.get(self.predicts)
        if found is None:
            raise UserError(f"loss {self.name!r} scores {self.predicts}, which the model does not give")
        return found

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """The loss itself; the prediction is fp32 or fp64."""
        raise NotImplementedError

    def wanted(self) -> str:
        """What it needs of the data, for sentences."""
        return " or ".join(" and ".join(names) for names in self.needs)

    def other_output(self) -> str:
        """What else helps where a model lacks what is scored, for the end of a sentence."""
        return ""

    def other_data(self) -> str:
        """How the data comes to have what is needed, for the end of a sentence."""
        return ""


def check_maps(prediction: Tensor, target: Tensor, valid: Tensor) -> None:
    """Refuse maps of different shapes and masks that are not boolean."""
    if not prediction.shape == target.shape == valid.shape:
        raise UserError(
            f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and valid {tuple(valid.shape)} "
            "must have one shape, [B, 1, H, W]: resize the prediction to the ground truth before the loss."
        )
    if valid.dtype != torch.bool:
        raise UserError(f"valid must be a bool mask, got {valid.dtype}: pass `target > 0` or similar.")
