"""Labelled images, and what a linear probe and the nearest neighbours read off frozen features of them.

Shared by `spark/commands/probe.py` and by the monitors of a run. Features are standardised with mean and standard
deviation of
the training split. kNN is the vote of the k nearest training images by cosine similarity s, each with weight
exp(s / 0.07), as in Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (section
3.4), and later DINO. The linear probe is multinomial logistic regression, by full-batch L-BFGS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize
from torch.utils.data import Dataset
from torchvision.transforms import functional

from spark.errors import FileError, UserError
from spark.images.decode import describe_failure, read_image
from spark.images.sources import list_images

SPLITS = ("train", "val")
TEMPERATURE = 0.07
STRENGTHS = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
)  # weaker ones take most of the time, and L-BFGS seldom converges
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

    Raises:
        FileNotFoundError: a split is missing.
        ValueError: a split without images, images outside the class folders, other classes in one split than in the
            other, or fewer than two.
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
        return functional.normalize(functional.to_tensor(image), list(self.mean), list(self.std))


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
    train: Tensor, labels: Tensor, queries: Tensor, neighbours: Sequence[int], classes: int
) -> dict[int, Tensor]:
    """Classes by the weighted vote of the nearest training images (Wu et al. 2018, section 3.4).

    Args:
        train: features [N, D], standardised.
        labels: [N].
        queries: features [M, D].
        neighbours: numbers k of voters.
        classes: number of classes.

    Returns:
        For each k the predicted labels [M].

    Raises:
        ValueError: a k above N.
    """
    most = max(neighbours)
    if most > len(train):
        raise UserError(f"k {most} is more than the {len(train)} training images: give a smaller one")
    bank = normalize(train, dim=1)
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for chunk in queries.split(1024):  # [1024, N] similarities at a time
        similarity, nearest = (normalize(chunk, dim=1) @ bank.T).topk(most, dim=1)
        weights, voters = (similarity / TEMPERATURE).exp(), labels[nearest]
        for k in neighbours:
            counts = weights.new_zeros(len(chunk), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            votes[k].append(counts.argmax(1))
    return {k: torch.cat(predicted) for k, predicted in votes.items()}


@dataclass
class LogisticRegression:
    """A fitted linear classifier.

    Attributes:
        weight: [classes, D].
        bias: [classes].
        converged: False if L-BFGS stopped at MAX_ITERATIONS.
    """

    weight: Tensor
    bias: Tensor
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, D] -> [N, classes]."""
        return linear(features, self.weight, self.bias)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of features [N, D] whose largest logit is that of their label [N]."""
        return share_equal(self.logits(features).argmax(1), labels)


def fit_logistic(features: Tensor, labels: Tensor, classes: int, strength: float) -> LogisticRegression:
    """Minimise mean cross-entropy + strength / 2 * |weight|^2 (the bias is free), from zero: nothing is random.

    In scikit-learn's terms, strength = 1 / (C * N).
    """
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(linear(features, weight, bias), labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    converged = optimizer.state[weight]["n_iter"] < MAX_ITERATIONS
    return LogisticRegression(weight.detach(), bias.detach(), converged)


def choose_strength(
    features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], seed: int
) -> tuple[float, list[dict[str, float]]]:
    """Choose the L2 strength on a tenth of the training split, held out of each class at random.

    Returns:
        The strength of the highest held-out accuracy, of equals that of the lowest cross-entropy; and for each strength
        its `l2`, `accuracy` and `cross_entropy` on the held-out images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels.cpu() == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: max(1, len(members) // 10)]]] = True
    held_out = held_out.to(labels.device)

    rows = []
    for strength in strengths:
        model = fit_logistic(features[~held_out], labels[~held_out], classes, strength)
        logits, wanted = model.logits(features[held_out]), labels[held_out]
        rows.append(
            {
                "l2": strength,
                "accuracy": share_equal(logits.argmax(1), wanted),
                "cross_entropy": cross_entropy(logits, wanted).item(),
            }
        )
    return min(rows, key=lambda row: (-row["accuracy"], row["cross_entropy"]))["l2"], rows


def share_equal(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries of two [N]."""
    return (predicted == labels).double().mean().item()
