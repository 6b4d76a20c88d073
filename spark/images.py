"""Unlabeled images: which files, how one is decoded, the official augmentation, and what could not be read.

Images are `[C, H, W]` float32, sizes are (H, W).  A sample is a function of the files and of (seed, position
in the training stream): not of workers, of ranks, or of where a run was resumed.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional

from spark.folders import write_whole
from spark.seeding import derive_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# What a file may really be, whatever it is called: the web has GIF under .png. JPEG includes phones' MPO.
# Pillow knows more formats, among them EPS, which starts another program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")

# Pillow's own limit for "a decompression bomb": 2 x 89,478,485 pixels, half a gigabyte as RGB.
MAX_PIXELS = 178_956_970

# So many unreadable files one after another are no accident: better to stop than to walk on in silence.
MAX_CONSECUTIVE_FAILURES = 1000

# Weights of R, G, B in brightness (ITU-R BT.601), as Pillow's conversion to grey uses them.
LUMA = (0.299, 0.587, 0.114)


# ----------------------------------------------------------------------------------------------------
# Which files
# ----------------------------------------------------------------------------------------------------


def list_images(source: str | Path) -> list[Path]:
    """The image files of a folder, or of a text list.

    A folder is searched through all its subfolders (flat, class folders, `train/` ...: all the same here)
    for files with one of `EXTENSIONS`, in upper or lower case. Names that start with a dot are skipped. Links
    are followed, and each real folder is entered once: a link back to a parent ends there. Sorted by path.

    A text list (UTF-8) has one path a line, relative to the folder of the list or absolute. Empty lines and
    lines that start with `#` are skipped. Order and repetitions are kept. The extension does not matter; a
    line that names a folder stands for the images in it.

    Raises:
        FileNotFoundError: the source, or a file named in the list, does not exist.
        ValueError: no image in the folder or the list; the source is neither a folder nor a text file.
        OSError: a subfolder cannot be read.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        return _images_in_folder(source)
    if source.is_file():
        return _images_in_list(source)
    raise FileNotFoundError(
        f"there is no image folder or list of images at {source.absolute()}: check the path "
        f"(a relative one starts at the current folder)"
    )


def _images_in_folder(root: Path) -> list[Path]:
    images: list[Path] = []
    others: Counter[str] = Counter()
    for folder, names in _walk(root):
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS:
                images.append(Path(folder, name))
            else:
                others[extension or "without extension"] += 1
    if not images:
        found = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        raise ValueError(
            f"no image in {root.absolute()} or its subfolders: looked for {' '.join(EXTENSIONS)}, "
            f"found {found or 'no file at all'} (hidden files not counted)"
        )
    return sorted(images)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder under `root` with its file names: hidden ones left out, each real folder once."""

    def stop(error: OSError) -> None:
        raise OSError(
            f"the folder {error.filename} cannot be read ({error.strerror}): "
            "correct its permissions or move it away"
        ) from error

    entered = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((identity.st_dev, identity.st_ino))
        # In order, so that of two links to one folder the same one is followed on every machine.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, [name for name in names if not name.startswith(".")]


def _images_in_list(path: Path) -> list[Path]:
    if path.suffix.lower() in EXTENSIONS:
        raise ValueError(
            f"{path} is a single image: give a folder of images, or a text list with one path a line"
        )
    content = path.read_bytes()
    if b"\0" in content:
        raise ValueError(
            f"{path} is not a text file: give a folder of images, or a text list with one path a line"
        )
    # surrogateescape keeps file names that are not UTF-8 as the file system has them.
    lines = (line.strip() for line in content.decode("utf-8-sig", errors="surrogateescape").split("\n"))
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise ValueError(f"the list {path} names no image: it needs one path a line")

    images: list[Path] = []
    missing: list[str] = []
    for entry in entries:
        image = path.parent / entry  # an absolute entry replaces the parent
        if image.is_dir():
            images.extend(_images_in_folder(image))
        elif image.exists():
            images.append(image)
        else:
            missing.append(entry)
    if missing:
        # Lists of image and depth pairs have more columns, and their paths may start with a slash.
        word = missing[0].split()[0].lstrip("/")
        raise FileNotFoundError(
            f"{len(missing)} of the {len(entries)} entries of {path} do not exist, first {_first(missing)}. "
            f"A line must hold one path and nothing else, absolute or relative to {path.parent.absolute()}"
            + (f", such as {word}" if (path.parent / word).is_file() else "")
        )
    return images


def _first(items: Sequence[str], count: int = 3) -> str:
    return "; ".join(items[:count])


# ----------------------------------------------------------------------------------------------------
# One image
# ----------------------------------------------------------------------------------------------------


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image file, whole and upright, to a PIL image of mode RGB.

    The EXIF orientation is applied. Transparency is composited over white, as a page would show it. 16 bits a
    channel become 8 (65535 becomes 255). CMYK is converted without a colour profile. Of a file with several
    frames the first is read. The kind of file is found from its content, not from its name.

    Raises:
        ValueError: more than `max_pixels` pixels (known before anything is decoded), or a kind of pixel whose
            white level is unknown (32-bit integers; floats outside 0..1).
        Exception: whatever Pillow raises on a truncated or corrupt file; no part of such a file is returned.
    """
    with _strict_pillow(), open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{width} x {height} pixels are more than max_pixels = {max_pixels}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, image.format)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Set Pillow's two process-wide switches as needed here, whatever other code set, and put them back.

    Truncated files are errors. The limit of pixels is left to the caller, as Pillow's is not per call.
    """
    saved = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = saved


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert a decoded image of any mode to RGB; Pillow's own conversion clips what has more than 8 bits."""
    # 16-bit grey has mode I;16 (big-endian: I;16B); from PGM, and from PNG in older versions, mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise ValueError("32-bit integer pixels have no known white level, convert the image to 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also false for NaN
            raise ValueError(
                "floating-point pixels outside 0..1 have no known white level, convert the image"
            )
        return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@dataclass
class PretrainTransform:
    """The official augmentation: random resized crop (bicubic), horizontal flip, to [0, 1], normalise.

    Random numbers come from torch's global generator. At a square size this is the transform of SparK's
    official code (Tian et al., ICLR 2023). For a rectangle the range of the crop's aspect ratio, 3/4 to 4/3,
    is taken relative to the rectangle's own, so that images are stretched no more than at a square size.

    Args:
        input_size: size of the result, (H, W) or one number for a square [px].
        in_chans: 3 for colour, 1 for grey.
        crop_scale: smallest and largest share of the image's area that a crop covers.
        mean: per channel, of values in [0, 1]; None: ImageNet's, weighted by luma for one channel.
        std: likewise.
        hflip: probability of a flip.

    Raises:
        ValueError: a value out of its range; not one mean or std for each channel.
    """

    input_size: int | tuple[int, int] = 224
    in_chans: int = 3
    crop_scale: tuple[float, float] = (0.67, 1.0)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    hflip: float = 0.5

    def __post_init__(self) -> None:
        size = (
            (self.input_size, self.input_size) if isinstance(self.input_size, int) else tuple(self.input_size)
        )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"input_size is (H, W) in pixels, at least 1 each, not {self.input_size}")
        if self.in_chans not in (1, 3):
            raise ValueError(
                f"in_chans {self.in_chans}: image files are read with 3 channels (colour) or 1 (grey); "
                "for other data pass tensors to SparK yourself"
            )
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is (smallest, largest) share of the area in (0, 1], not {self.crop_scale}"
            )
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is a probability between 0 and 1, not {self.hflip}")
        self.mean = mean = self._per_channel("mean", self.mean, IMAGENET_DEFAULT_MEAN)
        self.std = std = self._per_channel("std", self.std, IMAGENET_DEFAULT_STD)
        if min(std) <= 0:
            raise ValueError(f"std must be above 0 for every channel, not {std}")

        height, width = size
        aspect = width / height
        self._crop = transforms.RandomResizedCrop(
            size,
            scale=tuple(self.crop_scale),
            ratio=(3 / 4 * aspect, 4 / 3 * aspect),
            interpolation=transforms.InterpolationMode.BICUBIC,
        )
        self._flip = transforms.RandomHorizontalFlip(self.hflip)
        self._normalise = transforms.Normalize(mean, std)

    def _per_channel(
        self, name: str, values: Sequence[float] | None, colour: Sequence[float]
    ) -> tuple[float, ...]:
        if values is None:
            if self.in_chans == 3:
                return tuple(colour)
            return (sum(weight * value for weight, value in zip(LUMA, colour, strict=True)),)
        if len(values) != self.in_chans:
            raise ValueError(
                f"{name} has {len(values)} values for {self.in_chans} channels: "
                "give one a channel, or leave it out"
            )
        return tuple(float(value) for value in values)

    def __call__(self, image: Image.Image) -> Tensor:
        """Augment a PIL image: -> [C, H, W] float32, normalised."""
        image = self._flip(self._crop(image.convert("RGB" if self.in_chans == 3 else "L")))
        return self._normalise(functional.to_tensor(image))


# ----------------------------------------------------------------------------------------------------
# The stream of samples
# ----------------------------------------------------------------------------------------------------


class UnlabeledImages(Dataset):
    """Image files as the samples of a training stream, indexed by (position, index).

    `index` chooses the file; `position`, where the sample stands in the stream, seeds its augmentation. A
    file that cannot be read is replaced by the next one that can (after the last comes the first), so that a
    batch is always full and always the same; the sample tells what failed, for `UnreadableImages` to count.

    Args:
        files: from `list_images`; kept as `files`, a list of strings.
        transform: PIL image of mode RGB -> tensor; random numbers from torch's global generator of the CPU.
        seed: of the run.
        max_pixels: larger images count as unreadable.

    Raises:
        ValueError: no files; on reading, when no file can be read, or too many in a row cannot.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        max_pixels: int = MAX_PIXELS,
    ):
        if not files:
            raise ValueError("a data set needs at least one image file")
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, not {max_pixels}")
        self.files = [os.fspath(file) for file in files]
        self.transform = transform
        self.seed = seed
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """One sample.

        Returns:
            `image` [C, H, W]; `position` as given; `index` of the file that was read in the end; `failed`, a
            list with "path: reason" for each file tried before it.
        """
        position, index = item
        image, index, failed = self._first_readable(index)
        # The CPU's generator alone is forked and seeded: torch.manual_seed would reset those of the GPUs too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, position))
            return {"image": self.transform(image), "position": position, "index": index, "failed": failed}

    def _first_readable(self, index: int) -> tuple[Image.Image, int, list[str]]:
        failed: list[str] = []
        for step in range(min(len(self.files), MAX_CONSECUTIVE_FAILURES)):
            tried = (index + step) % len(self.files)
            try:
                return read_image(self.files[tried], self.max_pixels), tried, failed
            except Exception as error:  # on corrupt bytes Pillow's readers raise nearly everything
                failed.append(describe_failure(self.files[tried], error))
        raise ValueError(
            f"{len(failed)} of {len(self.files)} image files were tried one after another and none could be "
            f"read: check the data. First {_first(failed)}"
        )


def describe_failure(path: str | Path, error: Exception) -> str:
    """Say in one line, "path: reason", why a file could not be read; ": " is kept out of the reason.

    So the last ": " ends the path, which `UnreadableImages` counts.
    """
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image of a known kind, or its header is damaged"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = str(error) or type(error).__name__
    return f"{os.fspath(path)}: " + " ".join(reason.split()).replace(": ", ", ")


def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples of `UnlabeledImages`.

    Returns:
        `image` [B, C, H, W]; `position` and `index`, int64 [B]; `failed`, one list of strings.
    """
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "position": torch.tensor([sample["position"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }


class UnreadableImages:
    """The files that could not be read so far, counted once each against a share of the data set.

    A process sees only the failures of its own samples: gather them from all processes before `add`, so that
    all count the same and stop together.

    Args:
        num_files: size of the data set.
        max_share: at most this share of the files may be unreadable, 0 to 1. Above 0 it allows one file at least: in
            a data set of 50 files a share of 0.01 is one file, not none.

    Raises:
        ValueError: a share out of range.
    """

    def __init__(self, num_files: int, max_share: float):
        if not 0 <= max_share <= 1:
            raise ValueError(f"the share of unreadable images that is accepted lies in 0..1, not {max_share}")
        self.num_files = num_files
        self.max_share = max_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of files."""
        return len(self.reasons)

    def add(self, failed: Sequence[str]) -> list[str]:
        """Count failures as `describe_failure` writes them; all are recorded before anything is raised.

        Returns:
            Those that are new, to be told to the user once.

        Raises:
            ValueError: more than `max_share` of all files, and more than one, have failed by now; with a share of 0
                any failure.
        """
        new = []
        for failure in failed:
            path, _, reason = failure.rpartition(": ")
            if path not in self.reasons:
                self.reasons[path] = reason
                new.append(failure)
        allowed = max(self.max_share * self.num_files, 1 if self.max_share > 0 else 0)
        if new and len(self) > allowed:
            raise ValueError(
                f"{len(self)} of {self.num_files} images could not be read, more than the accepted share of "
                f"{self.max_share:g}: repair or remove them, or raise data.max_unreadable. "
                f"First {_first(self._lines())}"
            )
        return new

    def report(self, path: str | Path) -> None:
        """Write `skipped_images.txt`: a line "path: reason" for each file, sorted; nothing if none failed."""
        if self.reasons:
            text = "".join(f"{line}\n" for line in self._lines())
            write_whole(path, text.encode(errors="surrogateescape"))

    def _lines(self) -> list[str]:
        return [f"{path}: {reason}" for path, reason in sorted(self.reasons.items())]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.reasons = dict(state["reasons"])
