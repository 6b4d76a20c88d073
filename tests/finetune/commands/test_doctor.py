"""finetune/commands/doctor.py: each fault is named on files written with exactly that fault, and on none without."""

import re
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from scipy.io import savemat

from finetune.commands import doctor
from finetune.commands.work import doctor as work
from finetune.depth_data.doctor import Diagnosis, diagnose
from tests import depth_layouts as write
from tests.depth_layouts import png, put, scene

SIZE = (96, 128)


def sync(
    root: Path, change: Any = lambda image, depth: (image, depth), focal: str = " 518.8579", count: int = 5
) -> Path:
    """A healthy set in the sync layout, raw depth with holes, changed pair by pair: (image, depth [m]) -> the same."""
    rng = np.random.default_rng(0)
    for split, first in (("train", 0), ("val", 50)):
        lines = []
        for number in range(first, first + count):
            image, depth = scene(number, SIZE)
            depth = (depth + 0.001 * rng.integers(0, 50, SIZE) * (depth > 0)).astype(np.float32)
            image, depth = change(image, depth)
            folder = f"{split}_{number:04d}"
            put(root / folder / "rgb.png", png(image))
            stored = depth if depth.dtype == np.uint8 else write.millimetres(depth)
            put(root / folder / "depth.png", png(stored))
            lines.append(f"{folder}/rgb.png {folder}/depth.png{focal}\n")
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return root


def faults(root: Path, list_file: str | None = "nyu_train.txt", **options: Any) -> list[str]:
    return sorted(
        {finding.fault for finding in diagnose(root, list_file, **options).findings if finding.fault}
    )


def test_nothing_is_wrong_with_a_healthy_set(tmp_path: Path) -> None:
    assert faults(sync(tmp_path)) == []


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("mirrored", lambda image, depth: (image, depth[:, ::-1])),
        ("mirrored", lambda image, depth: (image[::-1, ::-1], depth)),
        ("transposed", lambda image, depth: (image, np.ascontiguousarray(depth.T))),
        ("transposed", lambda image, depth: (image.transpose(1, 0, 2), depth.T)),
        ("8-bit", lambda image, depth: (image, np.rint(depth * 25).astype(np.uint8))),
        ("8-bit", lambda image, depth: (image, np.rint(depth * 25.5) / 25.5)),
        ("filled", lambda image, depth: (image, np.where(depth == 0, 3 + image[..., 0] / 500, depth))),
        ("wrong scale", lambda image, depth: (image, depth * 5)),
        ("wrong scale", lambda image, depth: (image, depth * 0.256)),
        ("empty", lambda image, depth: (image, depth * (image.mean() > 140))),
    ],
)
def test_each_fault_is_named(tmp_path: Path, fault: str, change: Any) -> None:
    assert faults(sync(tmp_path, change)) == [fault]


def test_the_unit_is_guessed(tmp_path: Path) -> None:
    found = diagnose(sync(tmp_path, lambda image, depth: (image, depth * 5)), "nyu_train.txt")
    assert any("were 1/5000 m" in finding.text for finding in found.findings)


def test_the_unit_is_guessed_from_what_it_is_read_in(tmp_path: Path) -> None:
    """Arrays hold metres: millimetres there are millimetres, and nothing is taken for them."""
    root = write.write_fastdepth(tmp_path / "h5")
    for number in range(4):
        image, depth = scene(number)
        put(root / "train" / "room_0001" / f"{number:05d}.h5", write.h5(image, depth * 1000))
    (text,) = [f.text for f in diagnose(root).findings if f.fault == "wrong scale"]
    assert re.search(r"a median of \d\.\d m would follow if values taken for metres were millimetres", text)


def test_relative_depth_is_compared_with_its_image_too(tmp_path: Path) -> None:
    root = write.write_redweb(tmp_path)
    assert faults(root, None) == []
    maps = {path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (root / "RDs").iterdir()}
    for path, values in maps.items():
        path.write_bytes(png(values[:, ::-1]))
    assert faults(root, None) == ["mirrored"]
    for path, values in maps.items():
        path.write_bytes(png(values.T))
    assert faults(root, None) == ["transposed"]


@pytest.mark.parametrize(
    ("written", "list_file"),
    [(write.write_kitti, "eigen.txt"), (write.write_ibims, None), (write.write_nyu_pairs, "points.csv")],
)
def test_benchmark_sets_are_healthy_and_their_depth_is_compared(
    tmp_path: Path, written: Any, list_file: str | None
) -> None:
    root = written(tmp_path)
    assert faults(root, list_file) == []
    maps = [path for path in root.rglob("*.png") if {"proj_depth", "depth"} & set(path.parts)]
    for path in maps:
        path.write_bytes(png(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:, ::-1]))
    assert faults(root, list_file) == (["mirrored"] if maps else [])


def test_drives_of_kitti_in_both_lists_and_frames_without_depth(tmp_path: Path) -> None:
    root = write.write_kitti(tmp_path)
    lines = (root / "eigen.txt").read_text().splitlines(keepends=True)
    (root / "val.txt").write_text(lines[2])
    (root / "train.txt").write_text("".join(lines[:2] + lines[4:]))
    found = diagnose(root, "train.txt", val_list="val.txt")
    texts = [finding.text for finding in found.findings]
    assert any(text.startswith("1 of the 3 listed frames have no depth") for text in texts)
    assert [f.fault for f in found.findings if f.fault] == ["test in training"]
    assert any("2011_09_26_drive_0002_sync" in text for text in texts)


def test_ibims_without_edges_and_planes_is_told(tmp_path: Path) -> None:
    found = diagnose(write.write_ibims(tmp_path, geometry=False))
    assert found.healthy
    assert any("ibims-official" in finding.text for finding in found.findings)


def test_a_folder_may_be_called_filled(tmp_path: Path) -> None:
    """What the fault is called must not be sought in the path."""
    root = sync(
        tmp_path / "filled",
        lambda image, depth: (image, np.where(depth == 0, 3 + image[..., 0] / 500, depth)),
    )
    assert faults(root) == ["filled"]


def test_depth_transposed_in_the_labelled_file(tmp_path: Path) -> None:
    root = write.write_labeled(tmp_path)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "a") as file:
        turned = np.asarray(file["rawDepths"]).transpose(0, 2, 1)
        del file["rawDepths"]
        file["rawDepths"] = turned
    assert faults(root, None) == ["transposed"]


def test_a_plain_folder_is_told_its_median_depth(tmp_path: Path) -> None:
    root = write.write_folder(tmp_path / "camera", "png")  # in units of 1/256 m
    wrong, right = diagnose(root), diagnose(root, depth_scale=1 / 256)
    medians = []
    for found in (wrong, right):
        (text,) = [f.text for f in found.findings if "median depth is" in f.text]
        medians.append(float(text.split("median depth is ")[1].split(" m")[0]))
    assert medians[1] / medians[0] == pytest.approx(1000 / 256, rel=0.02)
    assert ["1/256" in "".join(f.text for f in found.findings) for found in (wrong, right)] == [True, False]


def test_verdict_counts(capsys: pytest.CaptureFixture[str]) -> None:
    found = Diagnosis()
    for verdict in ("nothing is wrong", "1 thing is wrong", "2 things are wrong"):
        work.report(found, work.Console())
        assert verdict in capsys.readouterr().out
        found.wrong("8-bit", "text")


def test_advice_names_the_options_of_this_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sync(tmp_path / "sync")
    folder = write.write_folder(tmp_path / "own", "npy")
    np.save(folder / "train" / "depth" / "0001.npy", np.full(write.SIZE, -1, np.float32))
    for path in (root, folder):
        with pytest.raises(SystemExit):
            doctor.main([str(path)])
    mat = write.write_labeled(tmp_path / "mat")
    with pytest.raises(SystemExit):
        doctor.main([str(mat), "--list", "nyu_train.txt"])
    said = " ".join(capsys.readouterr().out.split())
    assert "name the list file (--list)" in said
    assert "give --bad_depth hole" in said
    assert "to use that file leave --list out" in said
    assert not re.search(r"data\.(list|bad_depth|kind)", said)


def test_white_border(tmp_path: Path) -> None:
    def framed(image: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image = cv2.resize(image, (640, 480))
        image[:7], image[-6:], image[:, :7], image[:, -8:] = 255, 255, 255, 255
        return image, cv2.resize(depth, (640, 480), interpolation=cv2.INTER_NEAREST)

    root = sync(tmp_path, framed, count=3)
    assert faults(root) == ["white border"]
    assert faults(root, white_border="fill") == []


def test_missing_intrinsics(tmp_path: Path) -> None:
    assert faults(sync(tmp_path / "sync", focal="")) == ["no intrinsics"]
    folder = write.write_folder(tmp_path / "own", "npy")
    assert faults(folder, None) == ["no intrinsics"]
    (folder / "intrinsics.txt").write_text("525 525 320 240")
    assert faults(folder, None) == []


def test_test_scenes_in_training(tmp_path: Path) -> None:
    root = sync(tmp_path / "sync")
    train, val = (root / f"nyu_{split}.txt" for split in ("train", "val"))
    lines = val.read_text().splitlines(keepends=True)
    train.write_text(train.read_text() + lines[0])
    assert faults(root) == ["test in training"]
    # another frame of a scene
    put(root / "val_0050" / "rgb_2.png", (root / "val_0050" / "rgb.png").read_bytes())
    train.write_text(train.read_text().replace("val_0050/rgb.png", "val_0050/rgb_2.png"))
    found = diagnose(root, "nyu_train.txt")
    assert any("1 scenes to train on are in nyu_val.txt too" in finding.text for finding in found.findings)

    mat = write.write_labeled(tmp_path / "mat")
    assert "test in training" not in faults(mat, None)
    savemat(mat / "splits.mat", {"trainNdxs": np.array([[1], [3], [4]]), "testNdxs": np.array([[2], [4]])})
    assert "test in training" in faults(mat, None)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    root = sync(tmp_path)
    (root / "train_0003" / "depth.png").write_bytes(b"no image")
    found = diagnose(root, "nyu_train.txt")
    texts = [finding.text for finding in found.findings if finding.fault == "unreadable"]
    assert len(texts) == 1
    assert "train_0003/depth.png" in texts[0]
    assert "nyu_train.txt, line 4" in texts[0]


def test_an_unknown_folder(tmp_path: Path) -> None:
    found = diagnose(tmp_path)
    assert found.kind is None
    assert not found.healthy


@pytest.mark.parametrize("written", [write.write_diw, write.write_redweb, write.write_fastdepth])
def test_every_supervision_is_drawn_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Any
) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main([str(written(tmp_path / "data")), "--output", str(tmp_path / "pairs.png")])
    assert stopped.value.code == 0
    assert "nothing is wrong" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "pairs.png"))
    assert picture is not None
    assert picture.shape[0] > 800  # a row for each of 4 samples
    assert picture.std() > 20


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sync(tmp_path, focal="")
    with pytest.raises(SystemExit) as stopped:
        doctor.main([str(root), "--list", "nyu_train.txt"])
    assert stopped.value.code == 1
    assert "no intrinsics" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        doctor.main([str(tmp_path / "nowhere")])
    assert stopped.value.code == 2


@pytest.mark.real_data
def test_real_nyu(real_data: Path, tmp_path: Path) -> None:
    """The pairs here are filled, once 8-bit, and have the white border; a mirrored copy is recognised."""
    nyu = real_data / "nyu"
    assert faults(nyu, samples=8) == ["8-bit", "filled", "white border"]
    lines = (nyu / "nyu_train.txt").read_text().splitlines()[::90]
    for line in lines:
        image, depth = (name.lstrip("/") for name in line.split()[:2])
        put(tmp_path / image, (nyu / image).read_bytes())
        put(tmp_path / depth, png(cv2.imread(str(nyu / depth), cv2.IMREAD_UNCHANGED)[:, ::-1]))
    (tmp_path / "mirrored.txt").write_text("\n".join(lines))
    assert "mirrored" in faults(tmp_path, "mirrored.txt")
    raw: Diagnosis = diagnose(real_data / "nyu_16bit_raw_train")
    assert {finding.fault for finding in raw.findings} == {"", "no intrinsics"}
