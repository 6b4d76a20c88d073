"""Photos in folders of classes: which of them train, how they are augmented, and how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms

from finetune.label_config import ClassifyDataConfig
from spark.errors import UserError
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.decode import Picture
from spark.images.sources.files import FileSource
from spark.images.transform import PretrainTransform
from spark.monitor.probes import Preparation, PreparedImages, list_labelled
from spark.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class Photos:
    """Photos to train and to validate on.

    Attributes:
        root: the folder.
        classes: names; a label is an index of these.
        train: files.
        train_labels: int64 [N].
        val: files.
        val_labels: int64 [M].
    """

    root: Path
    classes: list[str]
    train: list[Path]
    train_labels: Tensor
    val: list[Path]
    val_labels: Tensor

    def training_set(self, transform: PretrainTransform, seed: int) -> UnlabeledImages:
        """Samples by (position in the stream, index in `train`), augmented by their position."""
        return UnlabeledImages(FileSource(self.train), SampleReader(transform, seed))

    def validation_set(
        self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> PreparedImages:
        """The photos of `val`, the shorter side resized, the middle cropped, normalised."""
        return PreparedImages(self.val, Preparation(size, tuple(mean), tuple(std)))

    def name(self, index: int) -> str:
        """Of a photo of `val`: CLASS/FILE."""
        return self.val[index].relative_to(self.root / "val").as_posix()


def open_photos(data: ClassifyDataConfig) -> Photos:
    """The photos of a run.

    Raises:
        UserError: classes that are empty, single, or in one split only; a share that leaves a class without a photo.
    """
    root = Path(data.root)
    found = list_labelled(root)
    train = found.train.nonzero()[:, 0]
    used = train[choose(found.labels[train], data.labels, data.labels_seed, found.classes)]
    val = (~found.train).nonzero()[:, 0]
    return Photos(
        root,
        found.classes,
        [found.files[i] for i in used.tolist()],
        found.labels[used],
        [found.files[i] for i in val.tolist()],
        found.labels[val],
    )


def choose(labels: Tensor, wanted: float, seed: int, classes: Sequence[str]) -> Tensor:
    """Indices of the photos that are used, ascending: of each class the same share or number, drawn at random.

    Of one seed, fewer photos are always part of more.

    Args:
        labels: of all photos, [N].
        wanted: share up to 1, or number of photos of each class above 1.
        seed: of the draw.
        classes: names of the classes.

    Raises:
        UserError: a class would be left without a photo, or has fewer than that number.
    """
    chosen = []
    for label, name in enumerate(classes):
        members = (labels == label).nonzero()[:, 0]
        count = round(wanted * len(members)) if wanted <= 1 else int(wanted)
        if count == 0:
            raise UserError(
                f"data.labels {wanted:g} leaves class {name} without a photo, it has {len(members)}: give a share of"
                f" {0.5 / len(members):.2g} or more, or a number of photos of each class"
            )
        if count > len(members):
            raise UserError(
                f"data.labels asks for {count} photos of each class, and {name} has {len(members)}"
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, label, Purpose.LABELS))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


AUGMENTATIONS = {"trivial": transforms.TrivialAugmentWide, "rand": transforms.RandAugment}


@dataclass
class PhotoTransform(PretrainTransform):
    """`PretrainTransform`, and then one of torchvision's policies; random numbers from torch's global generator.

    Args:
        augment: "none", or a name of `AUGMENTATIONS`.
    """

    augment: str = "none"

    def __call__(self, picture: Picture) -> Tensor:
        """Decode and augment: -> [C, H, W] uint8."""
        image = super().__call__(picture)
        return image if self.augment == "none" else AUGMENTATIONS[self.augment]()(image)
