"""Samples decoded once, into files that training maps into memory instead of decoding images and depth maps again.

The cache of a data set is a folder of its own, named after a digest of all that decides what its samples are: layout,
options of reading, names in their order, size and time of change of every file. Whatever of it changes, another folder
is taken, and none is read that does not fit.

Samples are stored as the readers give them, in whole frames: crops, zoom and rotation can need every pixel of them, so
training from the cache is training without it bit for bit. Depth that was whole millimetres is stored as such (2 bytes
a pixel), other depth as float32.

The samples come in parts of `PART`. A part is written under another name and renamed when it is whole, by whoever holds
its lock. So several processes, and several runs, write a cache together, and what an interrupted one has left out the
next one adds.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset

from finetune.depth_data.base import DepthSet
from finetune.depth_data.sample import DepthFileError, DepthSample
from spark.errors import FileError, UserError
from spark.files import write_whole
from spark.training.stop import ignore_stop_signals

FORMAT = 2
"""Of the files below; a change of it makes all caches anew."""

PART = 64
"""Samples of a part: few enough that several processes share the work, many enough for few files."""

ROW = np.dtype(
    [
        ("offset", "<i8"),  # where the sample begins in its part [bytes]
        ("height", "<i4"),  # of the image [px]; 0: the sample could not be read
        ("width", "<i4"),
        ("depth", "u1"),  # 0: none, or one of the following
        ("affine", "?"),
        ("labels", "?"),
        ("pairs", "<i4"),  # how many pairs of points; -1: none are known
    ]
)
"""What stands behind the samples of a part, one for each."""

MILLIMETRES, METRES = 1, 2
_MM = np.float32(1000.0)  # the division of `read_depth_png`, so that reading gives the very same numbers


class CachedSet(DepthSet):
    """A data set that is read from its cache, once `fill` has made that; before, and what it lacks, from its files.

    Args:
        data: the data set, as `open_depth_data` opens it.
        folder: where caches lie, each in a folder of its own.

    Attributes:
        folder: of this cache.

    Raises:
        OSError: a file of the data set is gone.
    """

    def __init__(self, data: DepthSet, folder: str | Path):
        self.data = data
        self.supervision, self.labelled = data.supervision, data.labelled  # type: ignore[misc]
        self.options, self.ground_truth = data.options, data.ground_truth
        self.facts = identity(data)
        self.folder = Path(folder) / f"{type(data).__name__}-{self.facts['sha256'][:16]}"
        self._names = data.names()
        self._rows: np.ndarray | None = None

    def __repr__(self) -> str:
        """What a run prints about its data, which is the same from a cache."""
        return repr(self.data)

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> list[str]:
        """Names of the samples, in order."""
        return self._names

    def origin(self, index: int) -> str:
        """Where a list names the sample."""
        return self.data.origin(index)

    def files(self) -> Iterator[Path]:
        """The files of the data set."""
        return self.data.files()

    def has_test_split(self) -> bool:
        """Whether the data set has one."""
        return self.data.has_test_split()

    def check_headers(self) -> None:
        """Check those of the data set."""
        self.data.check_headers()

    def __getitem__(self, index: int) -> DepthSample:
        if self._rows is None or not self._rows[index]["height"]:
            return self.data[index]  # which says what is wrong with the sample
        row, path = self._rows[index], self.part(index // PART)
        blocks = list(layout(row))
        size = sum(np.dtype(kind).itemsize * prod(shape) for _, kind, shape in blocks)
        try:
            # Mapped for this sample only: a process that mapped all parts would seem to use as much memory as they.
            mapped = np.memmap(path, np.uint8, "r", offset=int(row["offset"]), shape=(size,))
        except (OSError, ValueError) as error:
            raise FileError(
                f"{path} cannot be read, or was cut short, after the run had begun to use it: leave a cache in its"
                " place while runs read it. With --resume true the run goes on, and writes what is missing anew"
            ) from error
        arrays: dict[str, Any] = {}
        begin = 0
        for name, kind, shape in blocks:
            end = begin + np.dtype(kind).itemsize * prod(shape)
            arrays[name] = np.array(mapped[begin:end]).view(kind).reshape(shape)
            begin = end
        if row["depth"] == MILLIMETRES:
            arrays["depth"] = from_millimetres(arrays["depth"])
        return DepthSample(name=self._names[index], **{"depth": None, **arrays})

    @property
    def parts(self) -> int:
        """Number of parts."""
        return ceil(len(self) / PART)

    def part(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part_{number:05d}.bin"

    def missing(self) -> list[int]:
        """Parts that are not there, or not whole."""
        return [number for number in range(self.parts) if self._part_rows(number) is None]

    def needed(self) -> float:
        """About how many bytes are still to be written, judged by samples from beginning to end of the set."""
        missing = len(self.missing())
        if not missing:
            return 0.0
        sizes = []
        for index in np.linspace(0, len(self) - 1, 8).round().astype(int):
            with suppress(DepthFileError):
                sizes.append(sum(array.nbytes for array in pack(self.data[int(index)])[1]))
        return float(np.mean(sizes or [0])) * min(missing * PART, len(self))

    def write(self, number: int, wait: bool) -> None:
        """Write a part, unless it is there.

        Args:
            number: of the part.
            wait: for another process that is writing it; otherwise leave it to that one.

        Raises:
            OSError: disk full, no permission.
        """
        try:
            lock = FileLock(self.folder / f".part_{number:05d}.lock")
            with lock.acquire(timeout=-1 if wait else 0):
                if self._part_rows(number) is None:
                    self._write(number)
        except Timeout:
            return

    def _write(self, number: int) -> None:
        indices = range(number * PART, min((number + 1) * PART, len(self)))
        rows = np.zeros(len(indices), ROW)
        path = self.part(number)
        temporary = path.with_name(f".{path.name}.part")
        try:
            with temporary.open("wb") as file:
                for place, index in enumerate(indices):
                    try:
                        sample = self.data[index]
                    except DepthFileError:
                        continue  # its row stays zero
                    if sample.geometry is not None or sample.entries.keys() - set(FIELDS):
                        continue  # likewise: what no row describes is read from its own files each time
                    row, arrays = pack(sample)
                    rows[place] = (file.tell(), *row)
                    for array in arrays:
                        file.write(np.ascontiguousarray(array).data)
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FileError(
                    error.errno,
                    f"the disk is full, {path} of the cache was not written: free some space, or name another disk with"
                    " --data.cache FOLDER, and try again; the parts that are there stay",
                ) from error
            raise

    def _part_rows(self, number: int) -> np.ndarray | None:
        """Rows of a part, None where it is missing or not whole."""
        count = min(PART, len(self) - number * PART)
        try:
            with self.part(number).open("rb") as file:
                end = file.seek(0, os.SEEK_END) - count * ROW.itemsize
                if end < 0:
                    return None
                file.seek(end)
                rows = np.frombuffer(file.read(), ROW)
        except FileNotFoundError:
            return None
        sizes = [sum(np.dtype(kind).itemsize * prod(shape) for _, kind, shape in layout(row)) for row in rows]
        return rows if sum(sizes) == end else None

    def use(self) -> None:
        """Read from the cache from now on; it is whole.

        Raises:
            ValueError: what it holds is not what the files now give.
        """
        rows = [self._part_rows(number) for number in range(self.parts)]
        assert all(part is not None for part in rows)
        self._rows = np.concatenate([part for part in rows if part is not None])
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            with suppress(DepthFileError):
                fresh, kept = self.data[index], self[index]
                if any(not same(getattr(fresh, name), getattr(kept, name)) for name in FIELDS):
                    raise UserError(
                        f"the cache {self.folder} does not hold what the files of {fresh.name} now give: another"
                        " version of this project or of a library of images wrote it. Remove that folder, and the run"
                        " writes it anew"
                    )


FIELDS = ("image", "depth", "affine", "labels", "pairs", "relation")


def layout(row: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Field, kind of number and shape of the arrays of a sample, in the order in which they lie in a part.

    Args:
        row: a `ROW`.
    """
    size = int(row["height"]), int(row["width"])
    if not size[0]:
        return
    yield "image", "u1", (*size, 3)
    if row["depth"]:
        yield "depth", "<u2" if row["depth"] == MILLIMETRES else "<f4", size
    if row["affine"]:
        yield "affine", "<f4", size
    if row["labels"]:
        yield "labels", "u1", size
    if row["pairs"] >= 0:
        yield "pairs", "<f8", (int(row["pairs"]), 4)
        yield "relation", "<i8", (int(row["pairs"]),)


def pack(sample: DepthSample) -> tuple[tuple, list[np.ndarray]]:
    """A sample as the entries of its `ROW` behind the offset, and the arrays of `layout`."""
    depth, kind = sample.depth, 0
    if depth is not None:
        depth = depth.astype("<f4", copy=False)
        stored = to_millimetres(depth)
        depth, kind = (depth, METRES) if stored is None else (stored, MILLIMETRES)
    assert (sample.pairs is None) == (sample.relation is None)
    count = -1 if sample.pairs is None else len(sample.pairs)
    row = (*sample.image.shape[:2], kind, sample.affine is not None, sample.labels is not None, count)
    arrays = (sample.image, depth, sample.affine, sample.labels, sample.pairs, sample.relation)
    return row, [array for array in arrays if array is not None]


def to_millimetres(depth: np.ndarray) -> np.ndarray | None:
    """Depth float32 [m] as uint16 [mm], or None where `from_millimetres` would not give the same bits back."""
    with np.errstate(invalid="ignore", over="ignore"):
        stored = np.rint(depth * _MM).clip(0, 65535).astype("<u2")
    return stored if same(from_millimetres(stored), depth) else None


def from_millimetres(stored: np.ndarray) -> np.ndarray:
    """uint16 [mm] -> float32 [m]."""
    return stored.astype(np.float32) / _MM


def same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether two arrays have the same shape and bits, or are both None."""
    if one is None or other is None:
        return one is other
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
    )


def identity(data: DepthSet) -> dict[str, Any]:
    """What the samples of a data set depend on: "format", "layout", "options", "samples", and a "sha256" of all of it.

    The digest has the names of the samples in order, and name, size and time of change of every file; not the folders,
    so that data may move.
    """
    options = {name: value for name, value in asdict(data.options).items() if name not in ("list", "split")}
    facts = {"format": FORMAT, "layout": type(data).__name__, "options": options, "samples": len(data)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in data.names():
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for path in data.files():
        found = path.stat()
        text = f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    return {**facts, "sha256": digest.hexdigest()}


def check_room(caches: Sequence[CachedSet]) -> None:
    """Refuse caches that do not fit on their disk, before anything of them is written.

    Raises:
        OSError: too little room, or no permission to write there.
    """
    if not caches:
        return
    folder = caches[0].folder.parent
    needed = sum({cache.folder: cache.needed() for cache in caches}.values())
    present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if needed and not (present.is_dir() and os.access(present, os.W_OK | os.X_OK)):
        raise FileError(
            f"data.cache {folder} cannot be made: {present} is a file or read-only; name another folder"
        )
    free = shutil.disk_usage(present).free
    if needed > free:
        raise FileError(
            f"the cache needs about {needed / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free: free some"
            " space, name a folder on another disk with --data.cache FOLDER, or leave data.cache false"
        )


def fill(caches: Sequence[CachedSet], workers: int, share: float, say: Callable[[str], None]) -> None:
    """Write what the caches lack, together with all other processes that do, and read from them from now on.

    Args:
        caches: of one run.
        workers: processes that decode.
        share: where in the order of the parts this process begins, from 0 to 1, so that several begin apart.
        say: prints a line.

    Raises:
        OSError: disk full, no permission.
        ValueError: a cache does not hold what the files give, see `CachedSet.use`.
    """
    for cache in caches:
        missing = len(cache.missing())
        state = f"{missing} of {cache.parts} parts are to be written" if missing else "it is there"
        say(f"cache      {cache.folder}: {len(cache)} samples, {state}")
        prepare_folder(cache)
    others = {path for cache in caches for path in cache.folder.parent.glob("*/fingerprint.json")}
    unused = sorted({path.parent.name for path in others} - {cache.folder.name for cache in caches})
    if unused:
        say(
            f"cache      beside it lie caches of other files, lists or options, to be removed where no run uses them:"
            f" {', '.join(unused)}"
        )
    for wait in (False, True):  # first what nobody writes yet, then wait for the others
        parts = list(dict.fromkeys((cache.folder, number) for cache in caches for number in cache.missing()))
        if not parts:
            break
        first = int(share * len(parts))
        of = {cache.folder: cache for cache in caches}
        jobs = [(of[folder], number) for folder, number in parts[first:] + parts[:first]]
        loader = DataLoader(
            _Parts(jobs, wait),
            batch_size=None,
            num_workers=min(workers, len(jobs)),
            worker_init_fn=ignore_stop_signals,
        )
        for error in loader:
            if error is not None:
                raise error
    for cache in caches:
        cache.use()


def prepare_folder(cache: CachedSet) -> None:
    """Make the folder of a cache, with `fingerprint.json`, which says what it is of.

    Raises:
        OSError: it cannot be made.
    """
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.folder / ".lock"):
            if not (cache.folder / "fingerprint.json").exists():
                write_whole(cache.folder / "fingerprint.json", json.dumps(cache.facts, indent=2).encode())
    except OSError as error:
        raise FileError(
            f"data.cache {cache.folder} cannot be made ({error.strerror}): name a folder that you may write to"
        ) from error


class _Parts(Dataset[Exception | None]):
    """Writes a part when asked for it; an item is the error that stood against that (raised in a loader process it
    would be a traceback)."""

    def __init__(self, jobs: Sequence[tuple[CachedSet, int]], wait: bool):
        self.jobs, self.wait = jobs, wait

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Exception | None:
        cache, number = self.jobs[index]
        try:
            cache.write(number, self.wait)
        except (OSError, ValueError) as error:
            return error
        return None
