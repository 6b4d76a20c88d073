"""A depth model and its losses as the one module that is trained."""

from collections.abc import Mapping

from torch import Tensor, nn

from finetune.losses.base import NoGroundTruth
from finetune.losses.weighted import WeightedLoss
from finetune.model.depth_model import DepthModel


class TrainedDepth(nn.Module):
    """What is trained, saved in checkpoints, averaged and sharded: a model, and the modules that its losses own.

    Wrappers for several processes see one forward pass, from a batch to the loss. The parts of the model keep their
    names (`encoder`, `head`), and a loss with modules is a part beside them (`segmentation`): `state_dict` is that of
    the model, and the losses' behind it.

    Args:
        model: The model, shared and not copied. Exports are made of it alone.
        criterion: The losses; their modules are made here, with weights from torch's global generator.
    """

    model: DepthModel
    criterion: WeightedLoss

    def __init__(self, model: DepthModel, criterion: WeightedLoss) -> None:
        super().__init__()
        criterion.attach(model)
        # Not as submodules, which would put "model." and "criterion." before every name.
        self.__dict__.update(model=model, criterion=criterion)
        for name, part in (*model.named_children(), *criterion.losses.named_children()):
            assert not hasattr(self, name), f"loss {name} has the name of a part of the model"
            self.add_module(name, part)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and each of its terms that is defined, unweighted and detached, by name.

        Where no term is defined there is nothing to learn from: no terms, and a loss of zero whose gradient is zero.
        The backward pass must still be run, for other processes wait in it.

        Args:
            batch: `image` [B, 3, H, W] and the targets, see `WeightedLoss.entries`.
        """
        output = self.model(batch["image"])
        try:
            return self.criterion(output, batch, self.model)
        except NoGroundTruth:
            return self.criterion.nothing(output), {}

    def train(self, mode: bool = True) -> "TrainedDepth":
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        self.model.train(mode)
        return self
