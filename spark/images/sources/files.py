"""Image files: of a folder or of a text list."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from spark.errors import FileError, UserError
from spark.images.decode import EXTENSIONS
from spark.images.sources.names import Names


class FileSource:
    """Image files, named relative to the folder `root` where they lie below it.

    The names of a data set then stay the same when the whole of it is moved.
    """

    def __init__(self, paths: Sequence[str | Path], root: str | Path = ""):
        if not paths:
            raise UserError("a data set needs at least one image file")
        self._root = os.fspath(root)
        prefix = os.path.join(self._root, "")
        self._names = Names(os.fspath(path).removeprefix(prefix) for path in paths)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Path of a file."""
        return os.path.join(self._root, self._names[index])

    def read(self, index: int) -> bytes:
        """Content of a file."""
        with open(self.name(index), "rb") as file:
            return file.read()

    def digest(self) -> str:
        """See `Source`."""
        return self._names.digest()


def list_images(source: str | Path, confined: bool = False, arrays: bool = False) -> list[Path]:
    """The image files of a folder, or of a text list.

    A folder is searched through all its subfolders for files with one of `EXTENSIONS`, in upper or lower case. Names
    that start with a dot are skipped. Links are followed, and each real folder is entered once. Sorted by path.

    A text list (UTF-8) has one path a line, relative to the folder of the list or absolute. Empty lines and lines that
    start with `#` are skipped. Order and repetitions are kept. A line that names a folder stands for the images in it.

    Args:
        source: the folder or the list.
        confined: refuse relative entries of a list that lead out of its folder (`../`).
        arrays: take `.npy` files where a folder holds no image.

    Raises:
        UserError: there is no such source, or no image in it; a file named in the list is missing or leads out.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        return _images_in_folder(source, arrays)
    if source.is_file():
        return _images_in_list(source, confined, arrays)
    raise FileError(
        f"there is no image folder, list of images, tar shard or array at {source.absolute()}: check the path "
        f"(a relative one starts at the current folder)"
    )


def _images_in_folder(root: Path, arrays: bool) -> list[Path]:
    images: list[Path] = []
    numpy: list[Path] = []
    others: Counter[str] = Counter()
    for folder, names in walk(root):
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS:
                images.append(Path(folder, name))
            else:
                others[extension or "without extension"] += 1
                if extension == ".npy":
                    numpy.append(Path(folder, name))
    if arrays and not images:
        images = numpy
    if not images:
        found = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        raise UserError(
            f"no image in {root.absolute()} or its subfolders: looked for {' '.join(EXTENSIONS)}, "
            f"found {found or 'no file at all'} (hidden files not counted)"
        )
    return sorted(images)


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder under `root` with its file names: hidden ones left out, each real folder once."""

    def stop(error: OSError) -> None:
        raise FileError(
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


def _images_in_list(path: Path, confined: bool, arrays: bool) -> list[Path]:
    if path.suffix.lower() in EXTENSIONS:
        raise UserError(
            f"{path} is a single image: give a folder of images, or a text list with one path a line"
        )
    content = path.read_bytes()
    if b"\0" in content:
        raise UserError(
            f"{path} is not a text file: give a folder of images, or a text list with one path a line"
        )
    # surrogateescape keeps file names that are not UTF-8 as the file system has them.
    lines = (line.strip() for line in content.decode("utf-8-sig", errors="surrogateescape").split("\n"))
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"the list {path} names no image: it needs one path a line")

    images: list[Path] = []
    missing: list[str] = []
    for entry in entries:
        leads_out = not os.path.isabs(entry) and os.path.normpath(entry).split(os.sep)[0] == os.pardir
        if confined and leads_out:
            raise UserError(
                f"the entry {entry} of {path} leads out of the folder of the list: write it as an absolute path, "
                "or move the list"
            )
        image = path.parent / entry  # an absolute entry replaces the parent
        # os.path says of what cannot be a name, such as a long line of prose, that it is not there; pathlib raises.
        if os.path.isdir(image):
            images.extend(_images_in_folder(image, arrays))
        elif os.path.exists(image):
            images.append(image)
        else:
            missing.append(entry if len(entry) <= 100 else f"{entry[:100]}...")
    if missing:
        # Lists of image and depth pairs have more columns, and their paths may start with a slash.
        word = missing[0].split()[0].lstrip("/")
        raise FileError(
            f"{len(missing)} of the {len(entries)} entries of {path} do not exist, first {'; '.join(missing[:3])}. "
            f"A line must hold one path and nothing else, absolute or relative to {path.parent.absolute()}"
            + (f", such as {word}" if os.path.isfile(path.parent / word) else "")
        )
    return images
