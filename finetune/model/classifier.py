"""A classifier of photos on a timm encoder; what it leaves is a timm model, which needs nothing of this package."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model.encoder_model import EncoderModel
from spark.errors import UserError
from spark.model.encoder import timm_config
from spark.weights.encoder import save_encoder


class Classifier(EncoderModel):
    """The encoder's pooled features, as timm pools them, and a linear layer to classes.

    Args:
        encoder: A stock timm model without its classifier; it is used, not copied.
        classes: Names of the classes, two or more.
        frozen: The encoder never learns, and its features are standardised by a batch norm without parameters before
            the linear layer (He et al. 2022, MAE, appendix A.1: linear probing). An export folds it into the layer.
        image_size: (H, W) of the photos [px].
        mean: See `EncoderModel`.
        std: Likewise.

    Raises:
        UserError: The encoder is not timm's, or timm puts another classifier on it than one linear layer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: Sequence[str],
        frozen: bool = False,
        image_size: tuple[int, int] = (224, 224),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(encoder, image_size, mean, std)
        self.classes = list(classes)
        inputs = self._stock()[1].weight.shape[1]
        self.norm = nn.BatchNorm1d(inputs, affine=False) if frozen else nn.Identity()
        self.head = nn.Linear(inputs, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if frozen:
            self.probe_encoder()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W], normalised with `mean` and `std`."""
        with self.encoder_gradients():
            features = self.encoder(images)
        return self.head(self.norm(features))

    def stock(self) -> nn.Module:
        """The timm model with its classifier that gives the same logits in evaluation; a copy."""
        model, layer = self._stock()
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        if isinstance(self.norm, nn.BatchNorm1d):
            mean, var = self.norm.running_mean, self.norm.running_var
            assert mean is not None
            assert var is not None
            weight = weight / (var + self.norm.eps).sqrt()
            bias = bias - weight @ mean
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
            layer.bias.copy_(bias)
        return model

    def save(self, folder: str | Path) -> Path:
        """Export `stock`; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, with the class names.

        Raises:
            OSError: The disk is full or not writable.
        """
        model = self.stock()
        # Photos are prepared as in validation: the shorter side is resized to the input, nothing is cut off beside it.
        timm_config(model).update(crop_pct=1.0, crop_mode="center", interpolation="bicubic")
        return save_encoder(model, folder, self.mean, self.std, self.image_size, labels=self.classes)

    def _stock(self) -> tuple[Any, Any]:
        """A copy of the encoder with timm's own classifier on it, and the classifier."""
        name = type(self.encoder).__name__
        if not hasattr(self.encoder, "reset_classifier"):
            raise UserError(
                f"{name} is not timm's, and classifiers are exported as timm models: use a timm encoder"
            )
        model: Any = copy.deepcopy(self.encoder)
        model.reset_classifier(len(self.classes))
        model.to(next(self.encoder.parameters()).device)  # the new layer was made on the CPU
        layer = model.get_classifier()
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None:
            raise UserError(f"timm's classifier of {name} is no linear layer: use another encoder")
        return model, layer
