"""Loss on ordinal pairs: which of two points is farther (Depth in the Wild)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.losses.base import DepthLoss, NoGroundTruth
from spark.errors import UserError


class PairwiseRanking(DepthLoss):
    """Mean over pairs of `log(1 + exp(-r (z_A - z_B)))`, and of `(z_A - z_B)^2` where the two are equally far.

    z grows with distance: it is the predicted depth [m], or minus the affine-invariant inverse depth of a head without
    metres. Source: Chen et al. 2016 (Depth in the Wild, arXiv 1604.03901, equation 2).

    Args:
        polarity: What relation 1 says of point A. The project's data sets say "farther", as the original code of
            Depth in the Wild; texts in which "closer is higher" need "nearer".
        output: Which output of the model is ranked, depth or disparity_affine.
        drop_smallest: Share of the unequal pairs with the smallest losses that is left out.
    """

    needs = (("pairs", "relation", "pairs_valid"),)

    def __init__(
        self,
        polarity: Literal["farther", "nearer"] = "farther",
        output: Literal["depth", "disparity_affine"] = "depth",
        drop_smallest: float = 0.0,
    ) -> None:
        super().__init__()
        if polarity not in ("farther", "nearer"):
            raise UserError(
                f"polarity says what relation 1 means for A, farther or nearer, got {polarity!r}."
            )
        if output not in ("depth", "disparity_affine"):
            raise UserError(f"output must be depth or disparity_affine, got {output!r}.")
        if not 0 <= drop_smallest < 1:
            raise UserError(f"drop_smallest must be at least 0 and below 1, got {drop_smallest}.")
        self.predicts = output
        self.sign = 1 if polarity == "farther" else -1
        self.drop_smallest = drop_smallest

    def other_output(self) -> str:
        """Pairs can be ranked by either output."""
        return ", or rank what it gives (loss_options.ranking.output)"

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Compare the points of each pair.

        Args:
            prediction: [B, 1, H, W].
            targets: Points (row A, column A, row B, column B) [px], int64 [B, P, 4]; relations -1, 0, 1, integers
                [B, P]; and which of these are pairs, bool [B, P].
        """
        points, relation, valid = targets
        batch, _, height, width = prediction.shape
        if points.shape != (*relation.shape, 4) or valid.shape != relation.shape or len(points) != batch:
            raise UserError(
                f"pairs {list(points.shape)}, relation {list(relation.shape)} and pairs_valid {list(valid.shape)}"
                f" must be [B, P, 4], [B, P] and [B, P] for {batch} images."
            )
        image, number = valid.nonzero(as_tuple=True)
        if image.numel() == 0:
            raise NoGroundTruth(f"{type(self).__name__} needs at least one pair, and this batch has none")
        row_a, column_a, row_b, column_b = points[image, number].long().unbind(-1)
        limits = torch.tensor([height, width] * 2, device=points.device)
        if not ((points[image, number] >= 0) & (points[image, number] < limits)).all():
            raise UserError(
                f"a point of a pair lies outside the image of {height}x{width}: pairs are (row, column) of the image"
                " that the model sees; leave out those that a crop removes"
            )
        r = relation[image, number].to(prediction.dtype) * self.sign
        if not ((r == 0) | (r.abs() == 1)).all():
            raise UserError("a relation of a pair must be -1, 0 or 1.")
        farness = prediction[:, 0] if self.predicts == "depth" else -prediction[:, 0]
        difference = farness[image, row_a, column_a] - farness[image, row_b, column_b]
        unequal = F.softplus(-r * difference)[r != 0]
        if dropped := int(self.drop_smallest * unequal.numel()):
            unequal = unequal.sort().values[dropped:]
        return torch.cat((unequal, difference[r == 0].square())).mean()
