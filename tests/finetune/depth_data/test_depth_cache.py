"""finetune.depth_data.cache: the very same samples and training; written once, safely, and only where it fits."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import finetune.depth
from finetune.depth_data import CachedSet, DepthFileError, NYUSync, check_room, fill, open_depth_data
from finetune.depth_data import cache as module
from finetune.depth_data.labels import LabelOptions
from tests import depth_layouts as write
from tests.finetune.tasks.test_depth_layout_runs import run
from tests.finetune.tasks.test_depth_training import assert_same_weights, losses_of, weights_of


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def quiet(_: str) -> None:
    pass


def cache_of(root: Path, folder: Path, *arguments: Any, **options: Any) -> CachedSet:
    return CachedSet(open_depth_data(root, *arguments, **options), folder)


def filled(*caches: CachedSet, workers: int = 0) -> None:
    fill(caches, workers, 0.0, quiet)


def assert_same_sample(one: Any, other: Any) -> None:
    assert one.name == other.name
    for field in ("image", "depth", "affine", "labels", "pairs", "relation"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert a.dtype == b.dtype
            assert b.flags.writeable
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("written", "list_file", "options"),
    [
        (write.write_sync, "nyu_train.txt", {"labels": LabelOptions(13)}),
        (write.write_labeled, None, {"labels": LabelOptions(40), "white_border": "keep"}),
        (write.write_densedepth, None, {}),
        (write.write_fastdepth, None, {}),
        (write.write_hub_tars, None, {}),
        (write.write_diw, None, {}),
        (write.write_redweb, None, {}),
        (lambda root: write.write_folder(root, "pfm"), None, {}),
    ],
    ids=["sync", "labeled", "densedepth", "fastdepth", "hub", "diw", "redweb", "folder"],
)
def test_every_layout_comes_back_bit_for_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: Callable[[Path], Path],
    list_file: str | None,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(module, "PART", 3)  # several parts, the last of them shorter
    cache = cache_of(written(tmp_path / "data"), tmp_path / "cache", list_file, **options)
    plain = [cache.data[index] for index in range(len(cache))]
    filled(cache)
    shutil.rmtree(tmp_path / "data")  # nothing of it is read any more
    assert cache.names() == [sample.name for sample in plain]
    for index, sample in enumerate(plain):
        assert_same_sample(sample, cache[index])


def test_millimetres_take_two_bytes_and_other_depth_is_kept(tmp_path: Path) -> None:
    depth = np.array([[0, 1, 999, 65535]], np.uint16).astype(np.float32) / np.float32(1000)
    stored = module.to_millimetres(depth)
    assert stored is not None
    assert stored.tolist() == [[0, 1, 999, 65535]]
    assert module.from_millimetres(stored).tobytes() == depth.tobytes()
    for other in (0.0005, 65.536, np.nan, np.inf, -1.0, np.nextafter(np.float32(2.5), np.float32(3))):
        assert module.to_millimetres(np.full((1, 4), other, np.float32)) is None
    cache = cache_of(write.write_sync(tmp_path / "data"), tmp_path / "cache", "nyu_train.txt")
    filled(cache)
    height, width = cache[0].image.shape[:2]
    assert cache.part(0).stat().st_size == 4 * (height * width * 5 + module.ROW.itemsize)


def test_training_from_a_cache_is_training_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, own = write.write_sync(tmp_path / "sync"), write.write_folder(tmp_path / "own", "npy")
    options = {
        "data.list": "nyu_train.txt",
        "data.val_list": "nyu_val.txt",
        "data.sets": f"[{{root: {own}}}]",
        "data.rotation": 5,
        "data.contrast": "[0.8,1.2]",
        "data.cut_depth": 0.5,
        "max_steps": 4,
        "validate_every": 0.5,
    }
    plain = run(sync, tmp_path / "plain", **options)
    rows = run(sync, tmp_path / "cached", **options, **{"data.cache": "true", "data.workers": 2})
    assert losses_of(rows) == losses_of(plain)
    assert [row.get("val_rmse") for row in rows] == [row.get("val_rmse") for row in plain]
    assert_same_weights(weights_of(tmp_path / "cached"), weights_of(tmp_path / "plain"))
    folders = sorted((tmp_path / "cached" / "cache").iterdir())
    assert [folder.name.split("-")[0] for folder in folders] == ["NYUSync", "NYUSync", "PlainFolder"]
    facts = json.loads((folders[2] / "fingerprint.json").read_text())
    assert facts["samples"] == 4
    assert facts["sha256"].startswith(folders[2].name.split("-")[1])
    assert capsys.readouterr().out.count("1 of 1 parts are to be written") == 3

    # Another run reads the same folder, and nothing else once it has looked at that.
    reads = []
    getitem = NYUSync.__getitem__

    def counted(self: Any, index: int) -> Any:
        reads.append(index)
        return getitem(self, index)

    monkeypatch.setattr(NYUSync, "__getitem__", counted)
    decoded = []

    def noted(*arguments: Any) -> None:
        fill(*arguments)
        decoded.append(len(reads))

    monkeypatch.setattr(finetune.depth, "fill", noted)
    again = run(sync, tmp_path / "again", **options, **{"data.cache": tmp_path / "cached" / "cache"})
    assert losses_of(again) == losses_of(plain)
    assert decoded == [len(reads)]
    assert "it is there" in capsys.readouterr().out


def test_a_change_makes_another_cache(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path / "data")

    def folder(*arguments: Any, **options: Any) -> str:
        return cache_of(root, tmp_path / "cache", *(arguments or ("nyu_train.txt",)), **options).folder.name

    first = folder()
    assert folder() == first
    shutil.copy(root / "nyu_train.txt", root / "copy.txt")
    assert folder("copy.txt") == first  # the pairs count, not what the list is called
    lines = (root / "nyu_train.txt").read_text().splitlines(keepends=True)
    (root / "fewer.txt").write_text("".join(lines[:-1]))
    (root / "order.txt").write_text("".join(lines[::-1]))
    names = {first, folder("fewer.txt"), folder("order.txt"), folder(labels=LabelOptions(13))}
    names.add(folder(labels=LabelOptions(13, "class")))
    assert len(names) == 5
    image = root / "train_room" / "rgb_0001.png"
    os.utime(image, ns=(0, 1))
    assert folder() not in names
    names.add(folder())
    depth = root / "train_room" / "sync_depth_0000.png"
    told = depth.stat()
    depth.write_bytes(depth.read_bytes() + b"\0")
    os.utime(depth, ns=(told.st_atime_ns, told.st_mtime_ns))  # the size alone
    assert folder() not in names


def test_what_an_interrupted_run_left_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 2)
    root = write.write_sync(tmp_path / "data", train=6)
    cache = cache_of(root, tmp_path / "cache", "nyu_train.txt")
    read = type(cache.data).__getitem__
    reads: list[int] = []

    def broken(self: Any, index: int) -> Any:
        reads.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(type(cache.data), "__getitem__", broken)
        with pytest.raises(KeyboardInterrupt):
            filled(cache)
    assert reads == [0, 1, 2, 3]
    assert sorted(path.name for path in cache.folder.glob("*.bin*")) == ["part_00000.bin"]
    assert list(cache.folder.glob(".*.part")) == []
    # A part that lost its end, as after a power failure, and a leftover of a process that was killed.
    cache.write(1, wait=False)
    cache.part(1).write_bytes(cache.part(1).read_bytes()[:-40])
    (cache.folder / ".part_00002.bin.part").write_bytes(b"half")
    again = cache_of(root, tmp_path / "cache", "nyu_train.txt")
    assert again.missing() == [1, 2]
    stamp = again.part(0).stat().st_mtime_ns
    filled(again)
    assert again.part(0).stat().st_mtime_ns == stamp
    for index in range(6):
        assert_same_sample(again.data[index], again[index])
    assert list(cache.folder.glob(".*.part")) == []


def _fill_elsewhere(root: Path, folder: Path, start: Any, share: float) -> None:
    module.PART = 1
    cache = cache_of(root, folder, "nyu_train.txt")
    start.wait()
    fill([cache], 0, share, quiet)
    for index in range(len(cache)):
        assert_same_sample(cache.data[index], cache[index])


def test_several_processes_write_one_cache(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path / "data", train=12)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [
        context.Process(target=_fill_elsewhere, args=(root, tmp_path / "cache", start, share))
        for share in (0.0, 0.0, 0.5)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.bin"))) == 12


def test_pairs_that_cannot_be_read_are_told_as_without_a_cache(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path / "data")
    (root / "train_room" / "rgb_0002.png").write_bytes(b"no image")
    cache = cache_of(root, tmp_path / "cache", "nyu_train.txt")
    with pytest.raises(DepthFileError) as plain:
        cache.data[2]
    filled(cache)
    with pytest.raises(DepthFileError) as kept:
        cache[2]
    assert str(kept.value) == str(plain.value)
    assert_same_sample(cache.data[3], cache[3])


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write.write_sync(tmp_path / "data")
    cache = cache_of(root, tmp_path / "run" / "cache", "nyu_train.txt")
    pixels = int(np.prod(cache.data[0].image.shape[:2]))
    assert cache.needed() == 4 * pixels * 5
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * pixels * 5 - 1))
    with pytest.raises(OSError, match=r"the cache needs about .* GB in .*cache, where .*free some space"):
        check_room([cache])
    options = {"data.list": "nyu_train.txt", "data.cache": "true"}
    with pytest.raises(SystemExit):
        run(root, tmp_path / "run", **options)
    assert "--data.cache FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * pixels * 5))
    check_room([cache])


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(write.write_sync(tmp_path / "data"), tmp_path / "cache", "nyu_train.txt")

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full, .*part_00000\.bin of the cache was not written"):
        filled(cache)
    assert list(cache.folder.glob("*part_*.bin*")) == []


def test_samples_that_no_longer_agree_are_refused(tmp_path: Path) -> None:
    """As after an update of the readers, of which names and times of files know nothing."""
    root = write.write_sync(tmp_path / "data")
    filled(cache_of(root, tmp_path / "cache", "nyu_train.txt"))
    cache = cache_of(root, tmp_path / "cache", "nyu_train.txt")
    path = cache.part(0)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not hold what the files of .* now give.*Remove that folder"):
        filled(cache)


def test_a_cache_that_goes_away_is_named(tmp_path: Path) -> None:
    cache = cache_of(write.write_sync(tmp_path / "data"), tmp_path / "cache", "nyu_train.txt")
    filled(cache)
    cache.part(0).unlink()
    with pytest.raises(OSError, match=r"part_00000\.bin cannot be read.*--resume true"):
        cache[0]
