"""NYU readers: units, orientation, names, and what a user is told about data that is not as it should be."""

import pickle
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from finetune.depth_data import (
    DepthFileError,
    DepthSample,
    NYULabeled,
    NYUSync,
    open_depth_data,
    paint_border,
    read_depth_mm,
    read_rgb,
)


def colour_picture(height: int = 24, width: int = 32) -> np.ndarray:
    """A picture in which every pixel differs from its neighbours and from its mirror images."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 10 % 256, columns * 8 % 256, (rows + 3 * columns) % 256], -1).astype(np.uint8)


def depth_mm(height: int = 24, width: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    depth = (1000 + 37 * rows + 211 * columns).astype(np.uint16)
    depth[2:4, 5:9] = 0
    return depth


def write_pair(folder: Path, number: int = 0, image=None, depth=None) -> str:
    """Write a pair under `folder` (root / scene); its line in a list file."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colour_picture() if image is None else image).save(folder / f"rgb_{number}.png")
    cv2.imwrite(str(folder / f"sync_depth_{number}.png"), depth_mm() if depth is None else depth)
    return f"/{folder.name}/rgb_{number}.png /{folder.name}/sync_depth_{number}.png 518.8579"


def write_mat(folder: Path, count: int = 6, height: int = 24, width: int = 32) -> Path:
    """A small nyu_depth_v2_labeled.mat with its splits: MATLAB's reversed axes, odd images train, even ones test."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([colour_picture(height, width) + n for n in range(count)]).astype(np.uint8)
    raw = np.stack([depth_mm(height, width) / 1000.0 + n for n in range(count)]) * (
        depth_mm(height, width) > 0
    )
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["rawDepths"] = raw.transpose(0, 2, 1).astype(np.float32)
        file["depths"] = np.where(raw == 0, 9.0, raw).transpose(0, 2, 1).astype(np.float32)
    numbers = np.arange(1, count + 1, dtype=np.uint16)
    savemat(folder / "splits.mat", {"trainNdxs": numbers[::2, None], "testNdxs": numbers[1::2, None]})
    return folder / "nyu_depth_v2_labeled.mat"


# --- the sync layout
# -------------------------------------------------------------------------------------------


def test_sync_reads_metres_in_place(tmp_path):
    line = write_pair(tmp_path / "kitchen")
    (tmp_path / "list.txt").write_text(line + "\n")
    data = NYUSync(tmp_path, "list.txt")
    assert len(data) == 1
    assert data.entries[0].focal == 518.8579
    sample = data[0]
    assert sample.name == "kitchen/rgb_0.png"
    assert sample.image.dtype == np.uint8
    np.testing.assert_array_equal(sample.image, colour_picture())
    assert sample.depth.dtype == np.float32
    np.testing.assert_array_equal(sample.depth, depth_mm().astype(np.float32) / np.float32(1000))
    assert sample.depth.max() > 255 / 1000 * 10  # would be cut by an 8-bit read
    assert "sync" in repr(data)
    assert "1 pairs" in repr(data)


def test_sync_keeps_all_sixteen_bits(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    cv2.imwrite(str(tmp_path / "depth.png"), values)
    np.testing.assert_allclose(read_depth_mm(tmp_path / "depth.png"), values / 1000.0, rtol=1e-7)


@pytest.mark.parametrize(
    "where", ["inside root", "as a path", "with comments and blanks", "with a BOM and CRLF"]
)
def test_sync_list_forms(tmp_path, where):
    root = tmp_path / "root"
    line = write_pair(root / "hall")
    name: str | Path = "pairs.txt"
    if where == "inside root":
        (root / "pairs.txt").write_text(line)
    elif where == "as a path":
        name = tmp_path / "elsewhere.txt"
        Path(name).write_text(line[1:].replace(" /", " ").rsplit(" ", 1)[0])  # no slash and no focal length
    elif where == "with comments and blanks":
        (root / "pairs.txt").write_text(f"# pairs\n\n{line}\n\n")
    else:
        (root / "pairs.txt").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    data = NYUSync(root, name)
    assert data[0].name == "hall/rgb_0.png"
    assert (data.entries[0].focal is None) == (where == "as a path")


def test_sync_missing_root_and_list(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        NYUSync(tmp_path / "nowhere", "list.txt")
    write_pair(tmp_path / "hall")
    (tmp_path / "nyu_train.txt").write_text("")
    with pytest.raises(ValueError, match=r"looked for .*and .*nyu_train\.txt") as caught:
        NYUSync(tmp_path, "typo.txt")
    assert str(tmp_path / "typo.txt") in str(caught.value)
    with pytest.raises(ValueError, match="is empty"):
        NYUSync(tmp_path, "nyu_train.txt")


def test_a_list_is_looked_for_inside_the_root_first(tmp_path, monkeypatch):
    """Unless a folder is named: a file of the same name in the working directory is another list."""
    root, here = tmp_path / "root", tmp_path / "here"
    for folder, line in ((root, write_pair(root / "hall")), (here, write_pair(root / "attic"))):
        (folder / "lists").mkdir(parents=True)
        for name in ("pairs.txt", "lists/pairs.txt"):
            (folder / name).write_text(line)
    (here / "only.txt").write_text(write_pair(root / "attic"))
    (root / "lists" / "inner.txt").write_text(write_pair(root / "hall"))
    monkeypatch.chdir(here)
    found = {
        name: NYUSync(root, name)[0].name.split("/")[0]
        for name in (
            "pairs.txt",
            "./pairs.txt",
            "lists/pairs.txt",
            str(here / "pairs.txt"),
            "only.txt",
            "lists/inner.txt",
        )
    }
    assert found == {
        "pairs.txt": "hall",
        "./pairs.txt": "attic",
        "lists/pairs.txt": "attic",
        str(here / "pairs.txt"): "attic",
        "only.txt": "attic",
        "lists/inner.txt": "hall",
    }


@pytest.mark.parametrize(
    "line", ["/hall/rgb_0.png", "/a b/rgb.png /a b/depth.png 518", "rgb.png depth.png five"]
)
def test_sync_line_that_is_no_pair(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"# header\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: expected `image depth focal`"):
        NYUSync(tmp_path, "list.txt")


def test_sync_binary_file_as_list(tmp_path):
    Image.fromarray(colour_picture()).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="not a text list"):
        NYUSync(tmp_path, "picture.png")


def test_sync_missing_files_are_counted(tmp_path):
    lines = [write_pair(tmp_path / "hall", n) for n in range(3)]
    (tmp_path / "hall" / "rgb_1.png").unlink()
    (tmp_path / "hall" / "sync_depth_2.png").unlink()
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"2 of 6 files .*the first is .*rgb_1\.png"):
        NYUSync(tmp_path, "list.txt")


def test_sync_first_pair_is_checked_when_opened(tmp_path):
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "hall", depth=depth_mm(24, 30)))
    with pytest.raises(DepthFileError, match=r"hall/rgb_0\.png: .*24x32.*24x30"):
        NYUSync(tmp_path, "list.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((24, 32), 77, np.uint8), "uint8, expected 16-bit millimetres"),
        (np.full((24, 32, 3), 777, np.uint16), "3 channels"),
        (b"", "truncated"),
        (b"no image", "truncated, or not an image"),
        ("half", "truncated"),
        (None, "cannot be read as a depth map"),
    ],
    ids=["8 bit", "colour", "empty", "text", "half a file", "missing"],
)
def test_depth_files_that_are_refused(tmp_path, content, message):
    path = tmp_path / "depth.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        cv2.imwrite(str(path), depth_mm(240, 320))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content is not None:
        cv2.imwrite(str(path), content)
    with pytest.raises(DepthFileError, match=message) as caught:
        read_depth_mm(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(": ") == 1  # so that "path: reason" can be taken apart again


@pytest.mark.parametrize("damage", ["missing", "text", "half a JPEG", "half a PNG"])
def test_images_that_are_refused(tmp_path, damage):
    path = tmp_path / ("rgb.jpg" if "JPEG" in damage else "rgb.png")
    if damage == "text":
        path.write_text("no image")
    elif damage != "missing":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        DepthFileError, match=r"cannot be read as an image .*\), copy the file again, or take"
    ) as caught:
        read_rgb(path)
    assert str(caught.value).count(": ") == 1
    assert str(caught.value).count(path.name) == 1  # Pillow's own words name the file again


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.fromarray(colour_picture()[..., 1]).save(tmp_path / "grey.png")
    Image.fromarray(colour_picture()).convert("P").save(tmp_path / "palette.png")
    assert read_rgb(tmp_path / "grey.png").shape == (24, 32, 3)
    assert read_rgb(tmp_path / "palette.png").shape == (24, 32, 3)


def test_white_border(tmp_path):
    image = np.full((480, 640, 3), 255, np.uint8)
    inner = np.random.default_rng(0).integers(1, 255, (467, 625, 3)).astype(np.uint8)
    image[7:474, 7:632] = inner
    black, filled = paint_border(image, "black"), paint_border(image, "fill")
    assert paint_border(image, "keep") is image
    for painted in (black, filled):
        assert painted.shape == image.shape
        np.testing.assert_array_equal(painted[7:474, 7:632], inner)
    assert int((black == 0).sum()) == (480 * 640 - 467 * 625) * 3
    np.testing.assert_array_equal(filled[0, 7:632], inner[0])
    np.testing.assert_array_equal(filled[479, 7:632], inner[-1])
    np.testing.assert_array_equal(filled[7:474, 639], inner[:, -1])
    np.testing.assert_array_equal(filled[0, 0], inner[0, 0])
    assert (image[0] == 255).all()  # the original is left alone
    with pytest.raises(ValueError, match="24x32"):
        paint_border(colour_picture(), "fill")
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "hall", image=image, depth=depth_mm(480, 640)))
    np.testing.assert_array_equal(NYUSync(tmp_path, "list.txt", white_border="fill")[0].image, filled)


# --- the labelled file
# -----------------------------------------------------------------------------------------


def test_labeled_is_transposed_not_rotated(tmp_path):
    data = NYULabeled(write_mat(tmp_path), split="train", depth="raw")
    sample = data[1]  # image number 3, the third of the file
    np.testing.assert_array_equal(sample.image, colour_picture() + 2)
    expected = np.where(depth_mm() > 0, depth_mm() / 1000.0 + 2, 0)
    np.testing.assert_allclose(sample.depth, expected, rtol=1e-6)
    assert sample.depth.dtype == np.float32
    assert sample.name == "0003"
    assert sample.image.flags.c_contiguous


def test_labeled_splits_are_one_based_and_disjoint(tmp_path):
    path = write_mat(tmp_path)
    train, test = (NYULabeled(path, split=split) for split in ("train", "test"))
    assert [train[i].name for i in range(len(train))] == ["0001", "0003", "0005"]
    assert [test[i].name for i in range(len(test))] == ["0002", "0004", "0006"]
    np.testing.assert_array_equal(
        test[2].image, colour_picture() + 5
    )  # the last image of the file can be reached


def test_labeled_raw_has_holes_and_filled_has_none(tmp_path):
    path = write_mat(tmp_path)
    raw, filled = NYULabeled(path, depth="raw")[0].depth, NYULabeled(path, depth="filled")[0].depth
    assert (raw == 0).sum() == 8
    assert (filled > 0).all()
    np.testing.assert_array_equal(raw[raw > 0], filled[raw > 0])
    assert "raw depth" in repr(NYULabeled(path, depth="raw"))


def test_labeled_nan_is_refused_or_no_reading(tmp_path):
    path = write_mat(tmp_path)
    with h5py.File(path, "r+") as file:
        depths = file["rawDepths"]
        assert isinstance(depths, h5py.Dataset)
        depths[0, 3, 4] = np.nan
    with pytest.raises(
        DepthFileError, match=r"image 0001: 1 of 768 depths are NaN.* row 4, column 3.*bad_depth hole"
    ):
        NYULabeled(path)[0]
    assert NYULabeled(path, bad_depth="hole")[0].metres[4, 3] == 0


def test_labeled_in_worker_processes(tmp_path):
    """Each process opens the file for itself, also when the parent has read from it already, and when it is pickled."""
    data = NYULabeled(write_mat(tmp_path))
    here = [data[i].image.sum() for i in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert [sample.image.sum() for sample in loader] == here
    assert pickle.loads(pickle.dumps(data))[0].image.sum() == here[0]


def test_labeled_errors(tmp_path):
    with pytest.raises(ValueError, match=r"splits\.mat"):
        NYULabeled(tmp_path / "nyu_depth_v2_labeled.mat")
    path = write_mat(tmp_path)
    with pytest.raises(ValueError, match="'raw' or 'filled', not 'dense'"):
        NYULabeled(path, depth="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'train' or 'test', not 'val'"):
        NYULabeled(path, split="val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no file"):
        NYULabeled(tmp_path / "other.mat", splits_path=tmp_path / "splits.mat")
    (tmp_path / "text.mat").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"cannot open .* as HDF5"):
        NYULabeled(tmp_path / "text.mat", splits_path=tmp_path / "splits.mat")
    with pytest.raises(ValueError, match=r"cannot read .* as a MATLAB file"):
        NYULabeled(path, splits_path=path)

    savemat(tmp_path / "zero.mat", {"trainNdxs": np.array([[0], [1]])})
    with pytest.raises(ValueError, match="no 1-based image numbers"):
        NYULabeled(path, splits_path=tmp_path / "zero.mat")
    savemat(tmp_path / "long.mat", {"trainNdxs": np.array([[1], [7]])})
    with pytest.raises(ValueError, match=r"image 7 but .* holds 6"):
        NYULabeled(path, splits_path=tmp_path / "long.mat")

    with h5py.File(path, "r+") as file:
        del file["rawDepths"]
    with pytest.raises(ValueError, match="holds no array 'rawDepths'"):
        NYULabeled(path)
    assert len(NYULabeled(path, depth="filled")) == 3
    with h5py.File(path, "r+") as file:
        del file["depths"]
        file["depths"] = np.ones((6, 24, 32), np.float32)  # the axes of Python, not of MATLAB
    with pytest.raises(ValueError, match=r"expected \(N, 3, W, H\)"):
        NYULabeled(path, depth="filled")


# --- finding the layout
# ----------------------------------------------------------------------------------------


def test_open_picks_the_layout(tmp_path):
    path = write_mat(tmp_path)
    (tmp_path / "list.txt").write_text(write_pair(tmp_path / "hall"))
    assert "labelled" in repr(open_depth_data(tmp_path))
    assert "labelled" in repr(open_depth_data(path, split="test", depth="filled"))
    assert "sync" in repr(open_depth_data(tmp_path, "list.txt"))


def test_open_errors(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        open_depth_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        open_depth_data(tmp_path)
    (tmp_path / "nyu_train.txt").write_text(write_pair(tmp_path / "hall"))
    with pytest.raises(ValueError, match=r"name the list file \(data\.list\)\. .* holds nyu_train\.txt"):
        open_depth_data(tmp_path)
    with pytest.raises(ValueError, match="give one or the other"):
        open_depth_data(tmp_path / "nyu_train.txt", "list.txt")


def test_a_labelled_file_where_lists_are_named(tmp_path):
    path = write_mat(tmp_path)
    for root in (tmp_path, path):
        with pytest.raises(ValueError, match=r"--data\.list null --data\.val_list null"):
            open_depth_data(root, "nyu_train.txt")


def test_sample_checks_its_arrays():
    with pytest.raises(DepthFileError, match="not uint8"):
        DepthSample(np.zeros((4, 5, 3), np.float32), np.zeros((4, 5), np.float32), "x")
    with pytest.raises(DepthFileError, match="4x5, its depth map 5x4"):
        DepthSample(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.float32), "x")


# --- the real thing
# --------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_nyu(real_data):
    root = real_data / "nyu"
    train, val = NYUSync(root, "nyu_train.txt"), NYUSync(root, "nyu_val.txt")
    assert (len(train), len(val)) == (692, 103)
    scenes = [{entry.image.split("/")[0] for entry in data.entries} for data in (train, val)]
    assert not scenes[0] & scenes[1]
    for index in (0, 300, 691):
        sample = train[index]
        assert sample.image.shape == (480, 640, 3)
        assert sample.depth.shape == (480, 640)
        readings = sample.depth[sample.depth > 0]
        assert 0.3 < readings.min() < readings.max() <= 10.0


@pytest.mark.real_data
def test_real_raw_depth_has_holes(real_data, tmp_path):
    numbers = ("00000", "00050", "00100")
    lines = [f"rgb/rgb_{number}.jpg depth/sync_depth_{number}.png 518.8579" for number in numbers]
    (tmp_path / "raw.txt").write_text("\n".join(lines))
    data = NYUSync(real_data / "nyu_16bit_raw_train", tmp_path / "raw.txt")
    for index in range(len(data)):
        depth = data[index].depth
        assert 0.02 < (depth == 0).mean() < 0.6
        assert 0.4 < depth[depth > 0].min() < 3 < depth.max() < 10


@pytest.mark.real_data
def test_real_nyu_white_border(real_data):
    image = NYUSync(real_data / "nyu", "nyu_train.txt")[0].image
    assert image[:4].mean() > 240
    assert image[45:472, 43:608].mean() < 200


@pytest.mark.parametrize("read", [read_depth_mm, read_rgb])
def test_huge_images_are_refused_before_decoding(tmp_path, read):
    """Only the header says that it is huge: decoding it would end otherwise."""
    path = tmp_path / "huge.png"
    for width, height in ((70000, 70000), (2**20 + 1, 171), (18000, 10000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
        chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 0) + b"IDAT" + bytes(4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DepthFileError, match=r"huge\.png: "):
                read(path)


def test_headers_of_all_pairs_can_be_checked(tmp_path):
    lines = [write_pair(tmp_path / "hall", n) for n in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    pairs = NYUSync(tmp_path, "list.txt")
    pairs.check_headers()
    assert pairs.names() == [pairs[n].name for n in range(3)]
    depth = tmp_path / "hall" / "sync_depth_2.png"
    cv2.imwrite(str(depth), depth_mm(24, 30))
    with pytest.raises(DepthFileError, match=r"rgb_2\.png: .*24x32.*24x30"):
        pairs.check_headers()
    cv2.imwrite(str(depth), np.zeros((24, 32), np.uint8))
    with pytest.raises(DepthFileError, match=r"sync_depth_2\.png: .*kind L, expected 16-bit"):
        pairs.check_headers()
    depth.write_bytes(b"no image")
    with pytest.raises(DepthFileError, match=r"sync_depth_2\.png: cannot be read as a depth map"):
        pairs.check_headers()
