"""Labelled images, and what a linear probe and the nearest neighbours read off frozen features of them.

Shared by `spark-probe` and by the monitors of a run. Features are standardised with mean and standard
deviation of the training split. kNN is the vote of the k nearest training images by cosine similarity s, each with
weight exp(s / 0.07), as in Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(section 3.4), and later DINO. The linear probe is multinomial logistic regression. Both are scikit-learn's.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from spark.errors import FileError, UserError
from spark.images.decode import describe_failure, read_image
from spark.images.sources import list_images
from spark.model.normalise import Normalise

SPLITS = ("train", "val")
TEMPERATURE = 0.07
# Weaker L2 strengths take most of the time, and L-BFGS seldom converges.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MAX_ITERATIONS = 1000


@dataclass
class LabelledFiles:
    """The files of both splits, training split first.

    Attributes:
        classes: names, sorted; a label is an index of this list.
        files: [N].
        labels: [N], int64.
        train: [N], True in the training split.
    """

    classes: list[str]
    files: list[Path]
    labels: Tensor
    train: Tensor


def list_labelled(root: Path) -> LabelledFiles:
    """Find the images of `root/train/CLASS/` and `root/val/CLASS/`, subfolders of a class included.

    Both splits must have images of the same two or more classes.
    """
    named = {split: _files_with_class(root / split) for split in SPLITS}
    train, val = ({name for _, name in named[split]} for split in SPLITS)
    if train != val:
        only = [
            f"only in {split}/: {', '.join(sorted(names)[:3])}"
            for split, names in zip(SPLITS, (train - val, val - train), strict=True)
            if names
        ]
        raise UserError(
            f"train/ and val/ of {root} must have images of the same classes ({'; '.join(only)}): "
            "add what is missing, or move these folders away"
        )
    if len(train) < 2:
        raise UserError(
            f"{root} has images of a single class, {train.pop()}: it takes two or more, a folder each"
        )
    classes = sorted(train)
    entries = [(file, classes.index(name), split) for split in SPLITS for file, name in named[split]]
    return LabelledFiles(
        classes,
        [file for file, _, _ in entries],
        torch.tensor([label for _, label, _ in entries]),
        torch.tensor([split == "train" for _, _, split in entries]),
    )


def _files_with_class(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise FileError(
            f"there is no folder {folder}: labelled data are train/ and val/, each with a folder of images per class"
        )
    files = list_images(folder)
    for file in files:
        if file.parent == folder:
            raise UserError(f"{file} lies in no class: put it into a folder {folder}/CLASS")
    return [(file, file.relative_to(folder).parts[0]) for file in files]


@dataclass
class Preparation:
    """From a PIL image to what an encoder sees: shorter side resized, centre cropped, normalised.

    Attributes:
        size: (H, W) [px].
        mean: of each channel, of values in [0, 1]; three for colour, one for grey.
        std: likewise.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image of any size -> [C, H, W], float32."""
        height, width = self.size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        image = image if len(self.mean) == 3 else image.convert("L")
        return Normalise(self.mean, self.std)(pil_to_tensor(image))


class PreparedImages(Dataset):
    """Files as (index, tensor [C, H, W]); of a file that cannot be read, (index, "path: reason")."""

    def __init__(self, files: Sequence[Path], preparation: Preparation) -> None:
        self.files, self.preparation = files, preparation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            image = read_image(self.files[index])
        except Exception as error:  # on corrupt bytes Pillow's readers raise nearly everything
            return index, describe_failure(self.files[index], error)
        return index, self.preparation(image)


def require_images_of_each_class(classes: Sequence[str], train_labels: Tensor, val_labels: Tensor) -> None:
    """Two readable training images a class, for one is held out, and one validation image; ValueError if not."""
    for split, labels, wanted in (("train", train_labels, 2), ("val", val_labels, 1)):
        for name, count in zip(classes, labels.bincount(minlength=len(classes)).tolist(), strict=True):
            if count < wanted:
                raise UserError(
                    f"{split}/{name} has {count or 'no'} readable image{'' if count == 1 else 's'}, and {wanted} "
                    f"{'is' if wanted == 1 else 'are'} needed: add some, or move the class out of both splits"
                )


def standardise(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] and [M, D] in fp64, with mean 0 and standard deviation 1 of each over the *training* split.

    A feature that is constant up to rounding becomes 0 in the training split; it is not blown up to variance 1.
    """
    train, val = train.double(), val.double()
    mean, std = train.mean(0), train.std(0, correction=0)
    std = std.where(std > 1e-6 * mean.abs(), 1.0)
    return (train - mean) / std, (val - mean) / std


def knn_predict(
    train: Tensor, labels: Tensor, queries: Tensor, neighbours: Sequence[int]
) -> dict[int, np.ndarray]:
    """Classes by the weighted vote of the nearest training images (Wu et al. 2018, section 3.4).

    Args:
        train: features [N, D], standardised.
        labels: [N].
        queries: features [M, D].
        neighbours: numbers k of voters.

    Returns:
        For each k the predicted labels [M].
    """
    from sklearn.neighbors import KNeighborsClassifier  # here: importing it takes a second

    if max(neighbours) > len(train):
        raise UserError(
            f"k {max(neighbours)} is more than the {len(train)} training images: give a smaller one (--k)"
        )
    weights: Any = lambda distance: np.exp((1 - distance) / TEMPERATURE)  # noqa: E731
    voters = KNeighborsClassifier(metric="cosine", weights=weights)
    voters.fit(train.numpy(), labels.numpy())
    return {k: voters.set_params(n_neighbors=k).predict(queries.numpy()) for k in neighbours}


def fit_linear(features: Tensor, labels: Tensor, strength: float) -> Any:
    """Minimise mean cross-entropy + strength / 2 * |weight|^2 (the bias is free), by L-BFGS from zero.

    Returns scikit-learn's fitted `LogisticRegression`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # For two classes scikit-learn has one weight vector, the difference of the two that softmax has: twice the penalty.
    scale = 2 if len(labels.unique()) == 2 else 1
    inverse = scale / (strength * len(labels)) if strength else np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=inverse, tol=1e-6, max_iter=MAX_ITERATIONS)
        return model.fit(features.numpy(), labels.numpy())


def accuracy(model: Any, features: Tensor, labels: Tensor) -> float:
    """Share of features [N, D] that a fitted classifier gives their label [N]."""
    return float(model.score(features.numpy(), labels.numpy()))


def choose_strength(
    features: Tensor, labels: Tensor, strengths: Sequence[float], seed: int
) -> tuple[float, list[dict[str, float]]]:
    """Choose the L2 strength on a tenth of the training split, held out of each class at random.

    Returns:
        The strength of the highest held-out accuracy, of equals that of the lowest cross-entropy; and for each strength
        its `l2`, `accuracy` and `cross_entropy` on the held-out images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: max(1, len(members) // 10)]]] = True

    rows = []
    asked, wanted = features[held_out], labels[held_out]
    for strength in strengths:
        model = fit_linear(features[~held_out], labels[~held_out], strength)
        logarithms = torch.from_numpy(model.predict_log_proba(asked.numpy()))
        rows.append(
            {
                "l2": strength,
                "accuracy": accuracy(model, asked, wanted),
                "cross_entropy": nll_loss(logarithms, wanted).item(),
            }
        )
    return min(rows, key=lambda row: (-row["accuracy"], row["cross_entropy"]))["l2"], rows


def probe_scores(
    features: Tensor,
    labels: Tensor,
    train: Tensor,
    neighbours: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> dict[str, Any]:
    """Score frozen features on their validation split.

    Args:
        features: [N, D].
        labels: [N].
        train: [N] bool, True in the training split.
        neighbours: numbers k of voters.
        strengths: L2 strengths of the linear probe to choose from.
        seed: of the images that are held out for this choice.

    Returns:
        Top-1 accuracies: `knn` by k, and `linear`, a dict with `val`, `train`, the chosen `l2`, whether L-BFGS
        `converged`, and the scores on `held_out` images for each strength.
    """
    known, asked = standardise(features[train], features[~train])
    predicted = knn_predict(known, labels[train], asked, neighbours)
    strength, held_out = choose_strength(known, labels[train], strengths, seed)
    model = fit_linear(known, labels[train], strength)
    return {
        "features": features.shape[1],
        "knn": {str(k): float((predicted[k] == labels[~train].numpy()).mean()) for k in neighbours},
        "linear": {
            "val": accuracy(model, asked, labels[~train]),
            "train": accuracy(model, known, labels[train]),
            "l2": strength,
            "converged": bool(max(model.n_iter_) < MAX_ITERATIONS),
            "held_out": held_out,
        },
    }
