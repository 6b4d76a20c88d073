"""Losses on the structure of a map: SSIM with the ground truth, smoothness where the image is smooth (kornia)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.losses.base import DepthLoss, NoGroundTruth, check_maps
from spark.errors import UserError

if TYPE_CHECKING:
    from finetune.model.depth_model import DepthModel


class SSIM(DepthLoss):
    """Mean of `(1 - SSIM) / 2` between predicted and true depth, over windows in which every pixel has a reading.

    Depths are divided by `unit_depth` first, for SSIM's constants (0.01^2, 0.03^2) belong to the range [0, 1]. What is
    filled into holes therefore never counts. Computed by kornia: a Gaussian window of standard deviation 1.5.

    Args:
        unit_depth: Depth that counts as 1 [m].
        window: Side of the window, odd [px].
    """

    def __init__(self, unit_depth: float = 10.0, window: int = 11) -> None:
        super().__init__()
        if unit_depth <= 0:
            raise UserError(f"unit_depth must be positive, got {unit_depth}.")
        if window < 3 or window % 2 == 0:
            raise UserError(f"window must be odd and at least 3, got {window}.")
        self.unit_depth = unit_depth
        self.window = window

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Compare the maps.

        Args:
            prediction: Predicted depth [B, 1, H, W] [m].
            targets: Ground truth [B, 1, H, W] [m], and where there is any, bool [B, 1, H, W].
        """
        from kornia.losses import ssim_loss  # seconds to import, for this loss only

        target, valid = targets
        check_maps(prediction, target, valid)
        if min(valid.shape[-2:]) < self.window:
            raise UserError(
                f"a window of {self.window} does not fit into {valid.shape[-2]}x{valid.shape[-1]} pixels."
            )
        whole = F.max_pool2d((~valid).float(), self.window, stride=1) == 0
        if not whole.any():
            raise NoGroundTruth(
                f"{type(self).__name__} needs a window of {self.window}x{self.window} pixels that all have ground"
                " truth, and this batch has none: use filled depth, or a smaller window"
            )
        zero = torch.zeros_like(prediction)
        # kornia's "valid" map has one value for each window that lies inside, as the pooled mask has.
        losses = ssim_loss(
            torch.where(valid, prediction, zero) / self.unit_depth,
            torch.where(valid, target.to(prediction.dtype), zero) / self.unit_depth,
            self.window,
            reduction="none",
            padding="valid",
        )
        return losses[whole].mean()


class Smoothness(DepthLoss):
    """Absolute gradients of inverse depth, weighted down at edges of the image: `abs(dd) exp(-mean abs(dI))`.

    Summed over both axes, mean over pixels; needs no ground truth. Computed by kornia, colours in [0, 1].

    Args:
        normalise: Divide the inverse depth of each image by its mean first, so that far scenes are not the cheap ones
            (Monodepth2); false is the plain form.
    """

    predicts = "disparity"
    needs = (("image",),)

    def __init__(self, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise

    def targets(self, batch: Mapping[str, Tensor], model: "DepthModel") -> tuple[Tensor, ...]:
        """The images in [0, 1], without the normalisation that the model wants."""
        (images,) = super().targets(batch, model)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (model.mean, model.std))
        return (images * std + mean,)

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Compare with the image.

        Args:
            prediction: Inverse depth [B, 1, H, W].
            targets: Colours in [0, 1], [B, 3, H, W].
        """
        from kornia.losses import inverse_depth_smoothness_loss  # seconds to import, for this loss only

        (image,) = targets
        if prediction.shape[-2:] != image.shape[-2:] or len(prediction) != len(image):
            raise UserError(
                f"prediction {tuple(prediction.shape)} and image {tuple(image.shape)} must have one size."
            )
        if self.normalise:
            prediction = prediction / prediction.mean((1, 2, 3), keepdim=True).clamp(min=1e-7)
        return inverse_depth_smoothness_loss(prediction, image.to(prediction.dtype))
