"""The objects of a depth run from its options: the model, the decoder that only training has, and the pairs."""

from dataclasses import replace

import torch

from finetune.config import AugmentationConfig, DepthConfig
from finetune.depth_data import (
    KINDS,
    DepthSet,
    MixedSet,
    TrainingMix,
    TrainTransform,
    open_depth_data,
)
from finetune.losses.weighted import WeightedLoss
from finetune.model.depth_model import DepthModel, open_encoder
from finetune.protocols import Protocol
from finetune.scoring.checks import check_ground_truth
from finetune.tasks.trained import TrainedDepth
from spark.seeds import Purpose, derive_seed
from spark.training.option_types import values_of
from spark.weights.keys import KeyReport


def build_model(config: DepthConfig) -> tuple[DepthModel, KeyReport]:
    """The model of a run, and what became of the encoder's weights.

    The head is seeded apart from the encoder: it starts from the same weights whatever the encoder's are, so that
    encoders can be compared.
    """
    torch.manual_seed(derive_seed(config.seed, 0, Purpose.ENCODER_WEIGHTS))
    encoder, report = open_encoder(
        config.encoder,
        config.encoder_name,
        config.pretrained,
        config.model.drop_path,
        config.model.encoder_options,
    )
    torch.manual_seed(derive_seed(config.seed, 0, Purpose.HEAD_WEIGHTS))
    model = DepthModel(
        encoder,
        head=config.model.head,
        max_depth=config.model.max_depth,
        min_depth=config.model.min_depth,
        initial_depth=config.model.initial_depth,
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        **config.model.head_options,
    )
    return model, report


def build_trained(model: DepthModel, config: DepthConfig) -> TrainedDepth:
    """A model with the losses of a run, whose modules draw their weights apart from those of the model."""
    criterion = WeightedLoss(config.losses, config.loss_options)
    torch.manual_seed(derive_seed(config.seed, 0, Purpose.LOSS_WEIGHTS))
    return TrainedDepth(model, criterion)


def open_data(config: DepthConfig, protocol: Protocol) -> tuple[TrainingMix, DepthSet | None]:
    """The sets to train on, and the pairs to validate on if there are any."""
    data = config.data
    transform = train_transform(config)
    sets: list[MixedSet] = []
    for number, entry in enumerate((data, *data.sets), start=1):
        opened = open_depth_data(entry.root, entry.list, "train", **entry.reading())
        name = next(kind for kind, of in KINDS.items() if isinstance(opened, of))
        if name in {one.name for one in sets}:
            name = f"{name}-{number}"
        own = transform if entry is data else replace(transform, border=None)
        sets.append(MixedSet(name, opened, own, entry.weight))
    training = TrainingMix(sets, config.seed)
    pairs = sets[0].data
    if (
        data.val_list is None
        and data.val_root is None
        and (data.list is not None or not pairs.has_test_split())
    ):
        return training, None
    held_out = open_depth_data(
        data.val_root or data.root,
        data.val_list,
        "test",
        **{
            **data.reading(),
            "kind": data.val_kind or (data.kind if data.val_root is None else None),
            "depth": "filled" if protocol.depth == "filled" else "raw",
            "labels": None,
        },
    )
    check_ground_truth(held_out, protocol)
    return training, held_out


def train_transform(config: DepthConfig) -> TrainTransform:
    """The augmentation of a run."""
    options = values_of(config.data, AugmentationConfig)
    return TrainTransform(**options, min_depth=config.model.min_depth, max_depth=config.model.max_depth)
