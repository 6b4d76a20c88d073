"""Where the samples of a data set are named: folders that are searched, and lists with an entry a line."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.depth_data.base import DepthSet
from finetune.depth_data.sample import DepthFileError, DepthSample
from spark.errors import UserError
from spark.images.sources.files import walk

LABELED_MAT = "nyu_depth_v2_labeled.mat"
WITHOUT_LISTS = "to use that file give --data.list null (in training: --data.list null --data.val_list null)"
"""What to do where lists are named and a labelled file is there."""


@dataclass(frozen=True)
class NamedEntry:
    """A sample that is known by its name alone."""

    name: str
    line: int = 0


class ListedSet(DepthSet):
    """A data set with an entry for each sample, of a list or found in folders.

    Attributes:
        root: the folder that entries are relative to.
        list_file: the list; None: the folders were searched.
        entries: one for each sample.
    """

    root: Path
    list_file: Path | None = None
    entries: Sequence[Any]

    def __len__(self) -> int:
        return len(self.entries)

    def names(self) -> list[str]:
        """Names of the samples, in order."""
        return [entry.name for entry in self.entries]

    def origin(self, index: int) -> str:
        """The line of the list, if there is one."""
        return "" if self.list_file is None else line_text(self.list_file, self.entries[index].line)

    def __getitem__(self, index: int) -> DepthSample:
        entry = self.entries[index]
        with at_line(self.list_file, entry.line):
            return self.read(entry)

    @abstractmethod
    def read(self, entry: Any) -> DepthSample:
        """The sample of an entry."""

    def check_headers(self) -> None:
        """See `DepthSet`."""
        for entry in self.entries:
            with at_line(self.list_file, entry.line):
                self.check_header(entry)

    def check_header(self, entry: Any) -> None:
        """Check the headers of the files of an entry; nothing where they hold no more than reading will tell."""

    def refuse_missing(
        self, files: Iterable[tuple[str | Path, int]], exists: Callable[[str], bool] | None = None
    ) -> None:
        """Raise UserError if files of entries are missing.

        Args:
            files: path relative to the root, and line, of every file.
            exists: whether one is there; None looks below the root.
        """
        every = list(files)
        is_there = exists or (lambda name: (self.root / name).is_file())
        if missing := [(path, line) for path, line in every if not is_there(str(path))]:
            path, line = missing[0]
            where = "" if self.list_file is None else f" (line {line})"
            named = f"under {self.root}" if self.list_file is None else f"named in {self.list_file}"
            raise UserError(
                f"{len(missing)} of {len(every)} files {named} are missing, the first is {self.root / path}{where}: is"
                f" {self.root} what the entries are relative to?"
            )


@contextmanager
def at_line(list_file: str | Path | None, line: int) -> Iterator[None]:
    """Add the line of a list, if there is one, to errors about the files that it names."""
    try:
        yield
    except DepthFileError as error:
        if list_file is None:
            raise
        raise DepthFileError(f"{error}{line_text(list_file, line)}") from error


def line_text(list_file: str | Path, line: int) -> str:
    """The line of a list, for the end of a sentence."""
    return f" ({Path(list_file).name}, line {line})"


def existing_root(root: str | Path) -> Path:
    """`root` as a path; UserError when there is no such folder."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"no folder {root}: the data root must be the folder that the list's entries are relative to"
        )
    return root


def find_list(root: Path, list_file: str | Path) -> Path:
    """Find a list file.

    A bare name means the file inside `root`, and only where there is none, one of the working directory. A path with a
    folder in it (`./list.txt` too) or an absolute one is taken as given, and only where there is no such file, as one
    inside `root`.
    """
    as_given, inside = Path(list_file), root / list_file
    bare = not os.path.dirname(list_file)
    candidates = list(dict.fromkeys((inside, as_given) if bare else (as_given, inside)))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " and ".join(str(candidate) for candidate in candidates)
    labelled = f". It holds {LABELED_MAT}: {WITHOUT_LISTS}" if (root / LABELED_MAT).is_file() else ""
    raise UserError(f"no list file {list_file}: looked for {looked}. {lists_text(root)}{labelled}")


def lists_text(root: Path) -> str:
    """A sentence on the text files directly inside `root`, for error messages."""
    names = sorted(path.name for path in root.glob("*.txt"))
    return f"{root} holds {', '.join(names[:8])}" if names else f"{root} holds no .txt file"


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, with their numbers from 1; UserError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text list: {error}") from error
    found = [(number, text) for number, line in enumerate(lines, start=1) if (text := line.strip())]
    if not found:
        raise UserError(f"{path} is empty: it needs a line for each sample (docs/depth_data.md)")
    return found


def first_lines(root: Path, list_file: str | Path, count: int) -> list[str]:
    """The first lines of a list, stripped, to recognise it by; [] where there is no such file."""
    try:
        with find_list(root, list_file).open(encoding="utf-8-sig", errors="replace") as file:
            return [file.readline(10_000).strip() for _ in range(count)]
    except (ValueError, OSError):
        return []


def files_below(root: Path, *extensions: str) -> Iterator[Path]:
    """The regular files under `root` with one of these extensions (any, if none is given), in no order.

    Links are followed, and each real folder is entered once. Hidden files and folders are left out.
    """
    for folder, names in walk(root):
        for name in names:
            path = Path(folder, name)
            if (not extensions or path.suffix.lower() in extensions) and path.is_file():
                yield path
