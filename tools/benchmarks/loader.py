"""Images/s of the pretraining loader beside the plain one, both at the official augmentation.

- `plain`: Pillow and torchvision's transforms, as the original code has them (random resized crop of 0.67 to 1 of the
  area, bicubic; flip; ToTensor; Normalize), in a DataLoader.
- `ours`: what `spark/pretrain.py` iterates over: its data set, transform, stream of positions, and masks of a batch.
  Crops are decoded at full scale unless they are at least three times as large as the picture made of them.

A turn of a contender is a pass of its DataLoader over the same batches of the same files, so that turns are of equal
work and no loader process fetches ahead into the other's turn. The files are few and read before, so they come from the
system's cache: this is the work of a core, not of a disk. Batches stay in the main memory.

Shapes: images [B, 3, H, W]; of `plain` float32, normalised; of `ours` uint8, which the training process normalises on
its device, outside of what is measured here.
"""

import argparse
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, features
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from spark.errors import UserError
from spark.images.batches import collate_images
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.sources import FileSource, list_images
from spark.images.transform import PretrainTransform
from spark.model.masking import visible_at
from spark.model.normalise import Normalise
from spark.seeds import derive_seed
from spark.sparse.choice import device_name
from spark.training.sampling import StreamSampler
from tools.benchmarks.rows import Command, Row
from tools.benchmarks.timing import interleaved, summary

PATCH = 32
"""Side of the patches that ours draws masks of [px]; a picture needs two along each side."""

_TURN = 4  # batches of a loader process in a turn
_PHOTO = (375, 500)  # [px], (H, W): the commonest size of ImageNet's photos
_SEED = 0
_MASK_RATIO = 0.6  # of the masks that ours draws
# Mean difference over a picture, of values in [0, 1]: five of 255 levels. Decoding at a reduced scale or another
# filter stays below it; another box, a flip, another order of channels or no normalisation does not.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class LoaderCase:
    """What is measured.

    Attributes:
        data: "synthetic", or the name of the folder or list that the files are from.
        files: image files of a turn, each once or, with several loader processes, as often as there are such.
        size: side of the square pictures [px].
        batch: images of a batch.
        workers: loader processes; 0 is the process itself.
    """

    data: str
    files: Sequence[Path]
    size: int = 224
    batch: int = 64
    workers: int = 0

    @property
    def batches(self) -> int:
        """Of a turn."""
        return _TURN * max(1, self.workers)


class PlainImages(Dataset):
    """Image files read and augmented the plain way; indexed as ours are, by (position, index): -> [3, size, size]."""

    def __init__(self, files: Sequence[Path], size: int):
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=(0.67, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        """One picture."""
        with open(self.files[item[1]], "rb") as file:
            return cast(Tensor, self.transform(Image.open(file).convert("RGB")))


def data_sets(case: LoaderCase) -> dict[str, Dataset]:
    """The contenders' data sets, the base of all ratios first."""
    return {
        "plain": PlainImages(case.files, case.size),
        "ours": UnlabeledImages(FileSource(case.files), SampleReader(PretrainTransform(case.size), _SEED)),
    }


def loaders(case: LoaderCase) -> dict[str, DataLoader]:
    """The contenders' loaders, one pass over each of which is a turn."""
    patches = case.size // PATCH
    masked = partial(_collate_with_masks, grid=(patches, patches))
    return {
        name: DataLoader(
            images,
            batch_sampler=StreamSampler(len(case.files), case.batch, seed=_SEED, stop=case.batches),
            num_workers=case.workers,
            collate_fn=masked if name == "ours" else None,
            persistent_workers=case.workers > 0,
        )
        for name, images in data_sets(case).items()
    }


def _mean_and_std(images: UnlabeledImages) -> tuple[Sequence[float], Sequence[float]]:
    transform = cast(PretrainTransform, images.reader.transform)
    assert transform.mean is not None
    assert transform.std is not None
    return transform.mean, transform.std


def _collate_with_masks(samples: Sequence[dict[str, Any]], grid: tuple[int, int]) -> dict[str, Any]:
    """As `MaskedBatches` of spark/images/batches.py."""
    batch = collate_images(samples)
    batch["visible"] = visible_at(batch["position"].tolist(), grid, _MASK_RATIO, _SEED)
    return batch


def check_pictures(case: LoaderCase) -> None:
    """Speed of a wrong picture is no speed: of every file, both contenders must make the same one of the same numbers.

    Ours draws box and flip of a position from a generator seeded for it; plain gets that generator too.

    Raises:
        ValueError: a file cannot be read, or pictures differ by more than interpolation explains.
    """
    images = data_sets(case)
    std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    normalise = Normalise(*_mean_and_std(cast(UnlabeledImages, images["ours"])), fused=True)
    for position, file in enumerate(case.files):
        item = position, position
        sample = images["ours"][item]
        if sample["failed"]:
            raise UserError(f"{sample['failed'][0]}: repair the file, or name a list without it as --data")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(_SEED, position))
            expected = images["plain"][item]
        error = ((normalise(sample["image"]) - expected) * std).abs().mean().item()
        if not error <= _TOLERANCE:  # also for NaN
            raise UserError(
                f"{file}: ours and plain make different pictures of it (by {error:.3f} on average, of values in 0..1; "
                f"{_TOLERANCE} is allowed), so nothing is measured: as --data name upright RGB photos without "
                "transparency, which both read alike; if this is one, the loader is wrong"
            )


def loader_rows(data: Path | None, size: int, batch: int, workers: int, rounds: int) -> list[Row]:
    """A row for each contender: seconds of a turn and images/s, in turns.

    Args:
        data: folder or list of images, of which a turn takes evenly spread ones; None: synthetic photos.
        size: side of the pictures [px].
        batch: images of a batch.
        workers: loader processes of each contender.
        rounds: timed turns of each contender.

    Raises:
        ValueError: no images there, one that cannot be read, or contenders' pictures differ.
        OSError: the data do not exist; synthetic photos cannot be written.
    """
    torch.set_num_threads(1)  # a loader process has one
    wanted = _TURN * batch
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            name, files = "synthetic", write_photos(Path(folder), wanted)
        else:
            found = list_images(data)
            taken = min(wanted, len(found))
            name, files = data.name, [found[i * len(found) // taken] for i in range(taken)]
        case = LoaderCase(name, files, size, batch, workers)
        check_pictures(case)
        described = {**_files_of(case), "batch": str(batch), "height": str(size), "width": str(size)}
        turns = {name: partial(_read, loader) for name, loader in loaders(case).items()}
        seconds = interleaved(turns, rounds, "cpu")
    images = case.batches * batch
    return [
        {
            "kind": "loader",
            "contender": name,
            "base": "plain",
            **described,
            "workers": str(workers),
            "device": device_name("cpu"),
            **summary(times, seconds["plain"], images),
            "images_per_second_per_core": f"{images / statistics.median(times) / max(1, workers):.3f}",
            "rounds": str(rounds),
            "pillow": PIL.__version__,
            "libjpeg_turbo": features.version("libjpeg_turbo") or "",
            "torchvision": torchvision.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        for name, times in seconds.items()
    ]


def _read(loader: DataLoader) -> None:
    for _ in loader:
        pass


def _files_of(case: LoaderCase) -> dict[str, str]:
    """What a turn reads: how many files, their median size [px] and mean length [bytes]."""
    sizes = []
    for file in case.files:
        with Image.open(file) as image:
            sizes.append(image.size)
    return {
        "data": case.data,
        "files": str(len(case.files)),
        "file_height": f"{statistics.median(height for _, height in sizes):.0f}",
        "file_width": f"{statistics.median(width for width, _ in sizes):.0f}",
        "file_bytes": f"{statistics.mean(file.stat().st_size for file in case.files):.0f}",
    }


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write JPEGs whose spectrum falls with 1/frequency, as that of photos does, so that they decode as photos do."""
    files = [folder / f"{index:05}.jpg" for index in range(count)]
    for index, file in enumerate(files):
        Image.fromarray(_photo(np.random.default_rng(index))).save(file, quality=90)
    return files


def _photo(random: np.random.Generator) -> np.ndarray:
    """Random picture [H, W, 3] uint8: channels that share most of their texture, mean 0.45, deviation about 0.25."""
    height, width = _PHOTO
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no constant part
    noise = random.standard_normal((4, height, width))
    texture = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=_PHOTO)
    texture /= texture.std(axis=(1, 2), keepdims=True)
    channels = 0.45 + 0.24 * texture[:1] + 0.06 * texture[1:]
    return (255 * channels.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER_OR_LIST",
        help="images to read (default: synthetic JPEGs of 500x375 px, about 125 kB each, in a temporary folder)",
    )
    parser.add_argument(
        "--size", type=int, default=224, help="side of the square pictures [px] (%(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="images of a batch; four are a turn (%(default)s)"
    )
    about = "loader processes of each contender; 0 reads in the process itself, on one core (%(default)s)"
    parser.add_argument("--workers", type=int, default=0, help=about)


def check(options: argparse.Namespace) -> None:
    """Raise UserError for numbers that make no sense."""
    if options.size < 2 * PATCH or options.batch < 1 or options.workers < 0:
        raise UserError(
            f"--size must be {2 * PATCH} or more, for their masks; --batch 1 or more, --workers 0 or more"
        )


COMMANDS = {
    "loader": Command(
        "images/s per core of the pretraining loader, beside Pillow with torchvision's transforms",
        add_options,
        lambda o: iter([loader_rows(o.data, o.size, o.batch, o.workers, o.rounds)]),
        check,
    )
}
