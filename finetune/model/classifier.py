"""A classifier: a timm encoder, and a linear layer on its pooled features. What it saves plain timm loads."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.model.encoder_model import EncoderModel
from spark.errors import UserError
from spark.weights.encoder import CONFIG, WEIGHTS, load_encoder, save_encoder


class Classifier(EncoderModel):
    """Encoder and linear layer; with `linear` the encoder stays as it is, in evaluation mode, and the layer learns.

    Args:
        encoder: a timm model without classifier; it is used, not copied.
        classes: names, in the order of the logits; at least two.
        image_size: (H, W) that it is trained at, for the record [px].
        linear: train the layer alone.

    Raises:
        UserError: the encoder is not timm's, or timm's classifier of it is not a linear layer.
    """

    def __init__(
        self, encoder: nn.Module, classes: Sequence[str], image_size: tuple[int, int], linear: bool = False
    ):
        super().__init__(encoder)
        self.classes, self.image_size = list(classes), image_size
        self.head = _timm_classifier(encoder, len(classes))[1]
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if linear:
            self.probe_encoder()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> logits [B, classes]."""
        with self.encoder_gradients():
            features = self.encoder(images)
        return self.head(features)

    def save(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors as timm has them, whole or not at all:
        `timm.create_model("local-dir:FOLDER", pretrained=True)` is the classifier, `label_names` its classes."""
        model, classifier = _timm_classifier(self.encoder, len(self.classes))
        classifier.load_state_dict(self.head.state_dict())
        return save_encoder(model, folder, input_size=self.image_size, label_names=self.classes)


def load_classifier(folder: str | Path) -> Classifier:
    """What `Classifier.save` wrote, in evaluation mode."""
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    _, height, width = config["pretrained_cfg"]["input_size"]
    classifier = Classifier(load_encoder(folder), config["label_names"], (height, width))
    model, layer = _timm_classifier(classifier.encoder, len(classifier.classes))
    model.load_state_dict(load_file(Path(folder) / WEIGHTS))
    classifier.head.load_state_dict(layer.state_dict())
    return classifier.eval()


def _timm_classifier(encoder: nn.Module, classes: int) -> tuple[nn.Module, nn.Linear]:
    """A copy of the encoder with timm's own classifier, and that classifier."""
    model: Any = deepcopy(encoder)
    if not hasattr(model, "reset_classifier"):
        raise UserError(
            f"{type(encoder).__name__} is not timm's, so it has no classifier: take an encoder of timm to classify"
        )
    model.reset_classifier(classes)
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UserError(
            f"timm's classifier of {type(encoder).__name__} is a {type(classifier).__name__} and not a linear layer:"
            " take another encoder"
        )
    return model, classifier
