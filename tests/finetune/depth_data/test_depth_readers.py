"""Every layout of depth on disk: what is read back is what was written, and bad files are named with file and line."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat
from torch.utils.data import DataLoader

from finetune.depth_data import (
    DepthFileError,
    DepthTrainingSet,
    LabelOptions,
    TrainTransform,
    open_depth_data,
    recognise,
)
from finetune.depth_data.depth_files import MILLIMETRE, png_bytes, read_pfm
from finetune.depth_data.doctor import diagnose, other_unit
from finetune.depth_data.labels import NYU13_NAMES, NYU40_TO_13
from finetune.depth_data.lists import files_below
from finetune.depth_data.sets.folder import find_pairs
from tests import depth_layouts as write
from tests.depth_layouts import class_map, png, put, scene

LAYOUTS: dict[str, tuple[Any, dict[str, Any], float]] = {
    # how to write it, how to open it, how exact its depth is [m]
    "nyu_sync": (write.write_sync, {"list": "nyu_train.txt"}, 1e-6),
    "nyu_labeled": (write.write_labeled, {}, 1e-6),
    "densedepth zip": (write.write_densedepth, {}, 0.5 / 25.5 + 1e-6),
    "densedepth folder": (lambda root: write.write_densedepth(root, zipped=False), {}, 0.5 / 25.5 + 1e-6),
    "fastdepth": (write.write_fastdepth, {}, 1e-6),
    "hub_tars": (write.write_hub_tars, {}, 1e-6),
    "folder png": (write.write_folder, {"depth_scale": 1 / 256}, 0.5 / 256 + 1e-6),
    "folder npy": (lambda root: write.write_folder(root, "npy"), {}, 1e-6),
    "folder pfm": (lambda root: write.write_folder(root, "pfm"), {}, 1e-6),
    "kitti": (write.write_kitti, {"list": "eigen.txt"}, 0.5 / 256 + 1e-6),
    "ibims": (write.write_ibims, {}, 25 / 65535 + 1e-6),
}
WITHOUT_TEST_SPLIT = ("nyu_sync", "nyu_labeled", "kitti", "ibims")


def still(**options: Any) -> TrainTransform:
    return TrainTransform(
        image_size=(48, 64),
        crop_size=(48, 64),
        border=None,
        zoom=(1, 1),
        flip=0,
        colour=0,
        **{"mean": (0.0,) * 3, "std": (1.0,) * 3, **options},
    )


# --- what is read is what was written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_in_metres(tmp_path: Path, layout: str) -> None:
    written, options, exact = LAYOUTS[layout]
    root = written(tmp_path / "data")
    kind = layout.split()[0]
    assert recognise(root, options.get("list")) == kind
    data = open_depth_data(root, **options)
    assert data.supervision == "metric"
    numbers = [0, 2, 4] if kind == "nyu_labeled" else [0, 1, 2, 3]
    assert len(data) == len(data.names()) == len(set(data.names())) == len(numbers)
    for index, number in enumerate(numbers):
        sample, (image, depth) = data[index], scene(number)
        np.testing.assert_array_equal(sample.image, image)
        assert sample.image.flags.c_contiguous
        assert sample.metres.dtype == np.float32
        np.testing.assert_allclose(sample.metres, depth, atol=exact)
        assert sample.name == data.names()[index]
    data.check_headers()
    # in worker processes, of a data set that has been read from, and copied
    again = list(DataLoader(pickle.loads(pickle.dumps(data)), batch_size=None, num_workers=2))
    np.testing.assert_array_equal(again[-1].metres, data[len(data) - 1].metres)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in WITHOUT_TEST_SPLIT])
def test_the_other_split(tmp_path: Path, layout: str) -> None:
    written, options, _ = LAYOUTS[layout]
    root = written(tmp_path / "data")
    assert open_depth_data(root, **options).has_test_split()
    data = open_depth_data(root, split="test", **options)
    assert len(data) == 2
    np.testing.assert_array_equal(data[1].image, scene(101)[0])
    exact = 0.5 / 256 + 1e-6 if layout == "folder png" else 1e-6  # DenseDepth's test depth has 16 bits
    np.testing.assert_allclose(data[1].metres, scene(101)[1], atol=exact)


@pytest.mark.parametrize("zipped", [True, False])
def test_densedepth_test_arrays(tmp_path: Path, zipped: bool) -> None:
    root = write.write_densedepth_test(tmp_path, zipped, count=3)
    assert recognise(root) == "densedepth"
    data = open_depth_data(root, split="test")
    assert "3 test pairs" in repr(data)
    assert data.names() == ["eigen_test/0000", "eigen_test/0001", "eigen_test/0002"]
    for index in (0, 2, 1):  # back, too
        image, depth = scene(100 + index)
        np.testing.assert_array_equal(data[index].image, image)
        np.testing.assert_array_equal(data[index].metres, depth)
    again = list(DataLoader(pickle.loads(pickle.dumps(data)), batch_size=None, num_workers=2))
    np.testing.assert_array_equal(again[-1].image, scene(102)[0])
    with pytest.raises(ValueError, match=r"no nyu2_train\.csv in .*eigen_test_depth\.npy"):
        open_depth_data(root)
    # where the CSV of the test is there, it is the split
    with_both = write.write_densedepth(tmp_path, zipped=False)
    assert "nyu2_test.csv" in repr(open_depth_data(with_both, split="test"))


def test_bad_test_arrays(tmp_path: Path) -> None:
    root = write.write_densedepth_test(tmp_path, zipped=False)
    depth, good = root / "eigen_test_depth.npy", (root / "eigen_test_depth.npy").read_bytes()

    def opened() -> Any:
        return open_depth_data(root, split="test")

    def save(array: np.ndarray) -> None:
        np.save(depth, array, allow_pickle=True)

    save(np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"eigen_test_depth\.npy: holds Python objects"):
        opened()
    save(np.asfortranarray(np.ones((2, 48, 64), np.float32)))
    with pytest.raises(ValueError, match=r"order of Fortran.*ascontiguousarray"):
        opened()
    save(np.ones((3, 48, 64), np.float32))
    with pytest.raises(ValueError, match=r"has 2 images in eigen_test_rgb\.npy and 3 in"):
        opened()
    save(np.ones((2, 24, 32), np.float32))
    with pytest.raises(ValueError, match="the image is 48x64, its depth map 24x32"):
        opened()
    save(np.full((2, 48, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"eigen_test_depth\.npy, image 0: .* are NaN"):
        opened()
    depth.write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"eigen_test_depth\.npy: cannot be read as an array of NumPy"):
        opened()
    depth.write_bytes(good[:-100])
    data = opened()
    with pytest.raises(DepthFileError, match=r"image 1: cannot be read .*cut short at image 1 of 2"):
        data[1]
    depth.unlink()
    with pytest.raises(ValueError, match=r"no eigen_test_depth\.npy in"):
        opened()


def test_what_the_log_says(tmp_path: Path) -> None:
    texts = {
        name: repr(open_depth_data(written(tmp_path / name), **options))
        for name, (written, options, _) in LAYOUTS.items()
    }
    assert "4 pairs" in texts["fastdepth"]
    assert "8 bits (value * 10 / 255 m)" in texts["densedepth zip"]
    assert "2 tars" in texts["hub_tars"]
    assert "PNG of 0.00390625 m a unit" in texts["folder png"]


def test_png_files_of_a_plain_folder_say_their_unit(tmp_path: Path) -> None:
    depth = np.linspace(0.5, 6.0, 20 * 30, dtype=np.float32).reshape(20, 30)
    for number, scale in enumerate((0.002, MILLIMETRE)):
        for folder in ("rgb", "depth"):
            (tmp_path / folder).mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "rgb" / f"{number}.jpg"), np.zeros((20, 30, 3), np.uint8))
        (tmp_path / "depth" / f"{number}.png").write_bytes(png_bytes(depth, scale)[0])
    data = open_depth_data(tmp_path)
    assert "PNG of 0.002 m a unit" in repr(data)
    for sample in data:
        np.testing.assert_allclose(sample.metres, depth, atol=0.00101)
    assert not any("1/256" in finding.text for finding in diagnose(tmp_path).findings)
    assert "if values taken for units of 0.002 m were" in other_unit(60.0, data)
    with pytest.raises(ValueError, match=r"0\.png.*one unit is 0\.002 m, but data\.depth_scale is 0\.001"):
        open_depth_data(tmp_path, depth_scale=0.001)
    second = open_depth_data(tmp_path, depth_scale=0.002)
    with pytest.raises(ValueError, match=r"1\.png.*one unit is 0\.001 m"):
        second.check_headers()  # before training, not in it


def test_an_unknown_layout_lists_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_text("nothing")
    with pytest.raises(ValueError, match=r"nyu_labeled, densedepth, .*docs/use/depth_data\.md"):
        open_depth_data(tmp_path)
    with pytest.raises(ValueError, match="must be one of nyu_labeled"):
        open_depth_data(tmp_path, kind="make3d")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no train or.*h5|no \.h5 file of the split train"):
        open_depth_data(tmp_path, kind="fastdepth")
    with pytest.raises(ValueError, match="has no class labels, only nyu_labeled, nyu_sync"):
        open_depth_data(write.write_fastdepth(tmp_path / "h5"), labels=LabelOptions())


@pytest.mark.parametrize("kind", ["densedepth", "fastdepth"])
def test_lists_of_ones_own(tmp_path: Path, kind: str) -> None:
    if kind == "densedepth":
        root = write.write_densedepth(tmp_path)
        lines = write.densedepth_files()["data/nyu2_train.csv"].decode().splitlines()
        name = str(tmp_path / "mine.csv")
    else:
        root = write.write_fastdepth(tmp_path)
        lines = [f"train/room_0001/{number:05d}.h5" for number in range(4)]
        name = str(tmp_path / "mine.txt")
    Path(name).write_text("\n".join(lines[2:]))
    data = open_depth_data(root, name)
    assert len(data) == 2
    np.testing.assert_array_equal(data[0].image, scene(2)[0])
    Path(name).write_text("\n".join([lines[0], re.sub(r"\d\.", "7.", lines[1])]))
    with pytest.raises(ValueError, match=r"[12] of [24] files named in .*mine.* are missing.*line 2"):
        open_depth_data(root, name, kind=kind)  # type: ignore[arg-type]


# --- classes


def test_thirteen_of_forty_is_the_mapping_of_the_field() -> None:
    assert NYU13_NAMES[NYU40_TO_13[1] - 1] == "wall"
    assert [NYU13_NAMES[NYU40_TO_13[n] - 1] for n in (2, 3, 4, 5, 6, 9, 22, 25, 39, 40)] == [
        *("floor", "furniture", "bed", "chair", "sofa", "window", "ceiling", "tv", "furniture", "objects")
    ]
    assert len(NYU40_TO_13) == 41
    assert set(NYU40_TO_13[1:].tolist()) == set(range(1, 14))


@pytest.mark.real_data
def test_real_mapping(real_data: Path) -> None:
    official = loadmat(real_data / "nyu_meta" / "class13Mapping.mat")["classMapping13"][0, 0]
    np.testing.assert_array_equal(NYU40_TO_13[1:], official["labels13"].ravel())
    assert tuple(name.item() for name in official["classNames"].ravel()) == NYU13_NAMES


@pytest.mark.parametrize("void", ["ignore", "class"])
def test_classes_and_void(tmp_path: Path, void: Any) -> None:
    written = class_map()
    expected = np.where(written == 0, 255 if void == "ignore" else 13, written.astype(int) - 1)
    data = open_depth_data(
        write.write_sync(tmp_path / "sync"), "nyu_train.txt", labels=LabelOptions(13, void)
    )
    assert data.labelled
    labels = data[1].labels
    assert labels is not None
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.uint8
    out = DepthTrainingSet(data, still(), 0)[0, 1]
    np.testing.assert_array_equal(out["labels"].numpy(), expected)

    # the labelled file: its class n is class n of the 40 here, and 40 is mapped to 13
    mapped = np.where(written == 0, 255 if void == "ignore" else 13, NYU40_TO_13[written].astype(int) - 1)
    root = write.write_labeled(tmp_path / "mat")
    labels = open_depth_data(root, labels=LabelOptions(13, void))[1].labels
    assert labels is not None
    np.testing.assert_array_equal(labels, mapped)
    labels = open_depth_data(root, labels=LabelOptions(40, void))[1].labels
    assert labels is not None
    np.testing.assert_array_equal(
        labels, np.where(written == 0, 255 if void == "ignore" else 40, written.astype(int) - 1)
    )


def test_forty_classes_beside_the_image(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path)
    for path in (root / "train_room").glob("labels13_*.png"):
        path.rename(path.with_name(path.name.replace("13", "40")))
    thirteen = open_depth_data(root, "nyu_train.txt", labels=LabelOptions(13))[0].labels
    assert thirteen is not None
    np.testing.assert_array_equal(
        thirteen, np.where(class_map() == 0, 255, NYU40_TO_13[class_map()].astype(int) - 1)
    )
    with pytest.raises(ValueError, match=r"labels40_0100.* no such file of classes"):
        open_depth_data(root, "nyu_val.txt", labels=LabelOptions(40))


def test_bad_classes(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path / "sync")
    bad = class_map()
    bad[5, 7] = 14
    path = root / "train_room" / "labels13_0001.png"
    put(path, write.png(bad))
    data = open_depth_data(root, "nyu_train.txt", labels=LabelOptions(13))
    with pytest.raises(
        DepthFileError, match=r"labels13_0001\.png: class 14 at row 5, column 7.*nyu_train\.txt, line 2"
    ):
        data[1]
    put(path, write.png(class_map((20, 30))))
    with pytest.raises(DepthFileError, match=r"its map of classes 20x30.*nyu_train\.txt, line 2"):
        data[1]
    put(path, write.png(scene(0)[0]))
    with pytest.raises(DepthFileError, match="one channel"):
        data[1]
    mat = write.write_labeled(tmp_path / "mat")
    with h5py.File(mat / "nyu_depth_v2_labeled.mat", "r+") as file:
        file["labels"][2, 0, 0] = 895  # type: ignore[index]
    with pytest.raises(DepthFileError, match=r"image 0003: class 895 is not one of 0 \(void\) to 894"):
        open_depth_data(mat, labels=LabelOptions(13))[1]
    (mat / "classMapping40.mat").unlink()
    with pytest.raises(ValueError, match=r"classMapping40\.mat of the field is needed"):
        open_depth_data(mat, labels=LabelOptions(13))


# --- relations of points


def test_diw_relations(tmp_path: Path) -> None:
    root = write.write_diw(tmp_path)
    assert recognise(root) == recognise(root, "DIW_train_val.csv") == "diw"
    data, other = open_depth_data(root), open_depth_data(root, polarity="closer")
    assert data.supervision == "ordinal"
    assert "2 pairs" not in repr(data)
    assert "> says that A is farther" in repr(data)
    for index in range(4):
        sample, depth = data[index], scene(index)[1]
        assert sample.depth is None
        assert sample.pairs is not None
        assert sample.relation is not None
        y1, x1, y2, x2 = sample.pairs[0].astype(int)
        assert np.sign(depth[y1, x1] - depth[y2, x2]) == sample.relation[0]
        reversed_relation = other[index].relation
        assert reversed_relation is not None
        assert reversed_relation[0] == -sample.relation[0]
    with pytest.raises(ValueError, match="has no depth in metres"):
        _ = data[0].metres


def test_diw_counts_from_one_and_y_first(tmp_path: Path) -> None:
    put(tmp_path / "a.thumb", write.png(scene(0)[0]))
    (tmp_path / "pairs.csv").write_text("./a.thumb\n1,1,48,64,>,64,48\n1,64,2,3,<,64,48\n")
    sample = open_depth_data(tmp_path, "pairs.csv")[0]
    assert sample.pairs is not None
    assert sample.pairs.tolist() == [[0, 0, 47, 63], [0, 63, 1, 2]]
    assert sample.relation is not None
    assert sample.relation.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("49,1,2,3,>,64,48", r"a\.thumb: .*outside the image of 48x64.*pairs\.csv, line 2"),
        ("0,1,2,3,>,64,48", r"outside the image of 48x64.*line 2"),
        ("1,1,2,65,>,64,48", r"outside the image.*line 2"),
        ("1,1,2,3,>,48,64", r"the photo is 48x64, its annotation is for 64x48.*line 2"),
        ("1,1,2,3,?,64,48", r"pairs\.csv, line 2: expected `yA,xA,yB,xB,relation,width,height`"),
        ("1,1,2,>,64,48", r"pairs\.csv, line 2: expected"),
        ("b.thumb", r"pairs\.csv, line 1: a\.thumb has no annotation"),
    ],
)
def test_bad_annotations(tmp_path: Path, row: str, message: str) -> None:
    put(tmp_path / "a.thumb", write.png(scene(0)[0]))
    (tmp_path / "pairs.csv").write_text(f"./a.thumb\n{row}\n")
    with pytest.raises(ValueError, match=message):
        open_depth_data(tmp_path, "pairs.csv", kind="diw")


def test_diw_missing_photo(tmp_path: Path) -> None:
    root = write.write_diw(tmp_path)
    (root / "DIW_train_val" / "2.thumb").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 files .*2\.thumb \(line 5\)"):
        open_depth_data(root)


def test_redweb_is_disparity(tmp_path: Path) -> None:
    root = write.write_redweb(tmp_path)
    assert recognise(root) == "redweb"
    data = open_depth_data(root)
    assert data.supervision == "affine"
    for index in range(4):
        affine, depth = data[index].affine, scene(index)[1]
        assert affine is not None
        np.testing.assert_array_equal(np.isnan(affine), depth == 0)
        known = depth > 0
        # falls linearly with what the file has, 25 units a metre here
        np.testing.assert_allclose(affine[known], (254 - np.rint(25 * depth[known])) / 254, atol=1e-6)
    out = DepthTrainingSet(data, still(), 0)[0, 1]
    assert "depth" not in out
    np.testing.assert_array_equal(out["affine_valid"][0].numpy(), scene(1)[1] > 0)


# --- plain folders


@pytest.mark.parametrize(
    ("image", "depth"),
    [
        ("rgb/a/7.jpg", "depth/a/7.png"),
        ("frame-000007.color.jpg", "frame-000007.depth.png"),
        ("room/rgb_00007.jpg", "room/sync_depth_00007.png"),
        ("images/7.jpeg", "depths/7.npy"),
        ("7.png", "7.pfm"),
        ("7_rgb.png", "7_depth.npy"),
    ],
)
def test_names_that_belong_together(tmp_path: Path, image: str, depth: str) -> None:
    for number in (7, 8):
        put(tmp_path / image.replace("7", str(number)), b"")
        put(tmp_path / depth.replace("7", str(number)), b"")
    put(tmp_path / "labels13_7.png", b"")
    put(tmp_path / "intrinsics.txt", b"")
    pairs = [(entry.image, entry.depth) for entry in find_pairs(tmp_path, tmp_path)]
    assert pairs == [(image, depth), (image.replace("7", "8"), depth.replace("7", "8"))]


def test_folders_are_searched_through_links_and_each_once(tmp_path: Path) -> None:
    elsewhere = write.write_folder(tmp_path / "elsewhere", train=2, val=0)
    root = tmp_path / "mine"
    root.mkdir()
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)  # a circle
    put(root / ".hidden" / "rgb" / "9.png", png(scene(9)[0]))
    os.mkfifo(root / "depth_7.png")
    names = sorted(path.relative_to(root).as_posix() for path in files_below(root, ".png", ".jpg"))
    assert names
    assert all(name.startswith("linked/") for name in names)
    assert len(open_depth_data(root, kind="folder")) == 2


def test_names_without_partner(tmp_path: Path) -> None:
    put(tmp_path / "rgb" / "1.png", b"")
    with pytest.raises(ValueError, match="no pairs of an image and a depth map"):
        find_pairs(tmp_path, tmp_path)
    put(tmp_path / "depth" / "1.png", b"")
    put(tmp_path / "depth" / "2.png", b"")
    with pytest.raises(ValueError, match=r"1 of 3 files .* no partner, the first is depth/2\.png"):
        find_pairs(tmp_path, tmp_path)
    put(tmp_path / "depth" / "1.npy", b"")
    with pytest.raises(ValueError, match=r"depth/1\.npy and depth/1\.png are depth maps of one pair"):
        find_pairs(tmp_path, tmp_path)


def test_folder_with_a_list(tmp_path: Path) -> None:
    root = write.write_folder(tmp_path, "npy")
    (root / "mine.txt").write_text("train/rgb/0003.png train/depth/0003.npy\n")
    assert recognise(root, "mine.txt") == "folder"
    data = open_depth_data(root, "mine.txt")
    np.testing.assert_array_equal(data[0].metres, scene(3)[1])
    assert not data.has_test_split()


def test_pfm_rows_go_upwards_and_the_sign_is_the_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.pfm"
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    path.write_bytes(b"Pf\n3 2\n0.5\n" + values[::-1].tobytes())
    np.testing.assert_array_equal(read_pfm(path), values)
    np.testing.assert_array_equal(read_pfm(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) * 0.5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DepthFileError, match="cut short, 2x3 numbers"):
        read_pfm(path)
    path.write_bytes(b"PF\n3 2\n0.5\n")
    with pytest.raises(DepthFileError, match="one channel"):
        read_pfm(path)


# --- bad input


def flawed_npy(root: Path, values: np.ndarray) -> tuple[str, dict[str, Any]]:
    write.write_folder(root, "npy")
    np.save(root / "train" / "depth" / "0001.npy", values)
    lines = [f"train/rgb/{number:04d}.png train/depth/{number:04d}.npy" for number in range(4)]
    (root / "mine.txt").write_text("\n".join(lines))
    return r"0001\.npy: {}.*mine\.txt, line 2", {"list": "mine.txt"}


@pytest.mark.parametrize("number", [np.nan, np.inf, -0.5])
def test_depth_that_is_no_distance(tmp_path: Path, number: float) -> None:
    depth = scene(1)[1].copy()
    depth[30, 40] = depth[20, 10] = number
    pattern, options = flawed_npy(tmp_path, depth)
    shown = rf"2 of 3072 depths are NaN, infinite or negative, the first {number:g} at row 20, column 10"
    with pytest.raises(DepthFileError, match=pattern.format(shown)):
        open_depth_data(tmp_path, **options)[1]
    holes = open_depth_data(tmp_path, **options, bad_depth="hole")[1].metres
    expected = np.where(depth == number, 0, scene(1)[1]) if np.isfinite(number) else None
    assert holes[20, 10] == holes[30, 40] == 0
    assert (holes == 0).sum() == (scene(1)[1] == 0).sum() + 2
    if expected is not None:
        np.testing.assert_array_equal(holes, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((20, 30), np.float32), r"the image is 48x64, its depth map 20x30"),
        (np.ones((48, 64, 3), np.float32), r"depth is numbers \[H, W\]"),
        (np.array([[object()]]), "cannot be read as a depth map"),
    ],
)
def test_depth_of_another_kind(tmp_path: Path, values: np.ndarray, message: str) -> None:
    _, options = flawed_npy(tmp_path, values)
    with pytest.raises(DepthFileError, match=message + r".*\(mine\.txt, line 2\)"):
        open_depth_data(tmp_path, **options)[1]


def test_eight_bits_where_sixteen_are_promised(tmp_path: Path) -> None:
    eight = write.png(np.full((48, 64), 99, np.uint8))
    sync = write.write_sync(tmp_path / "sync")
    put(sync / "train_room" / "sync_depth_0002.png", eight)
    with pytest.raises(DepthFileError, match=r"0002\.png: .*uint8, expected 16-bit.*nyu_train\.txt, line 3"):
        open_depth_data(sync, "nyu_train.txt")[2]
    with pytest.raises(DepthFileError, match=r"0002\.png: .*nyu_train\.txt, line 3"):
        open_depth_data(sync, "nyu_train.txt").check_headers()
    dense = write.write_densedepth(tmp_path / "dense", zipped=False)
    put(dense / "data" / "nyu2_test" / "00001_depth.png", eight)
    with pytest.raises(DepthFileError, match=r"00001_depth\.png: .*uint8.*nyu2_test\.csv, line 2"):
        open_depth_data(dense, split="test")[1]
    put(
        dense / "data" / "nyu2_train" / "room_0001_out" / "2.png",
        write.png(np.full((48, 64), 999, np.uint16)),
    )
    with pytest.raises(DepthFileError, match=r"2\.png: .*uint16.*8 bits.*nyu2_train\.csv, line 2"):
        open_depth_data(dense)[1]
    folder = write.write_folder(tmp_path / "folder")
    put(folder / "train" / "depth" / "0003.png", eight)
    with pytest.raises(DepthFileError, match=r"0003\.png: .*uint8"):
        open_depth_data(folder)[3]


def test_missing_files_have_a_line(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path / "sync")
    (root / "train_room" / "rgb_0002.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 8 files .*rgb_0002\.png \(line 3\)"):
        open_depth_data(root, "nyu_train.txt")
    data = open_depth_data(write.write_sync(tmp_path / "later"), "nyu_train.txt")
    (tmp_path / "later" / "train_room" / "rgb_0002.png").unlink()  # after it was opened
    with pytest.raises(DepthFileError, match=r"rgb_0002\.png: cannot be read.*nyu_train\.txt, line 3"):
        data[2]


def test_a_mat_file_of_another_version(tmp_path: Path) -> None:
    root = write.write_labeled(tmp_path)
    savemat(root / "nyu_depth_v2_labeled.mat", {"images": np.zeros((4, 4, 3, 2), np.uint8)})
    with pytest.raises(ValueError, match=r"version 5 of MATLAB's files, the official .* is of 7\.3 \(HDF5\)"):
        open_depth_data(root)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_tar_cut_short(tmp_path: Path, share: float) -> None:
    root = write.write_hub_tars(tmp_path)
    shard = root / "data" / "train-000001.tar"
    content = shard.read_bytes()
    end = 512 + 512 * -(-len(write.h5(*scene(2))) // 512)  # of the first entry
    shard.write_bytes(content[: int(2 * end * share)])
    with pytest.raises(ValueError, match=r"train-000001\.tar is cut off in"):
        open_depth_data(root)


def test_damaged_h5_and_zip(tmp_path: Path) -> None:
    root = write.write_fastdepth(tmp_path / "h5")
    data = open_depth_data(root)
    path = root / "train" / "room_0001" / "00002.h5"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DepthFileError, match=r"00002\.h5: cannot be read as an HDF5 file"):
        data[2]
    with h5py.File(path, "w") as file:
        file["rgb"] = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(DepthFileError, match=r"00002\.h5: holds no array depth"):
        data[2]
    archive = write.write_densedepth_test(tmp_path / "arrays")  # compressed
    content = bytearray(archive.read_bytes())
    content[3000:3400] = bytes(400)
    archive.write_bytes(content)
    with pytest.raises(DepthFileError, match=r"eigen_test_rgb\.npy.*cannot be read as"):
        open_depth_data(archive, split="test")
    archive = write.write_densedepth(tmp_path / "zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match="neither a folder nor a whole zip"):
        open_depth_data(archive, kind="densedepth")


def test_a_map_without_any_reading_is_reported_and_not_trained_on(tmp_path: Path) -> None:
    root = write.write_sync(tmp_path)
    put(root / "train_room" / "sync_depth_0001.png", write.png(np.zeros((48, 64), np.uint16)))
    data = open_depth_data(root, "nyu_train.txt")
    out = DepthTrainingSet(data, still(), 0)[0, 1]
    assert out["name"].endswith("rgb_0002.png")
    (line,) = out["failed"]
    assert re.search(r"rgb_0001\.png: .*no reading at all.*nyu_train\.txt, line 2", line)
    assert line.count(": ") == 1


def test_every_layout_names_maps_without_any_reading(tmp_path: Path) -> None:
    image, depth = scene(1)
    root = write.write_redweb(tmp_path / "redweb")
    put(root / "RDs" / "0001.png", write.png(np.full((48, 64), 255, np.uint8)))
    (line,) = DepthTrainingSet(open_depth_data(root), still(), 0)[0, 1]["failed"]
    assert re.search(r"0001\.jpg: .*no reading at all", line)
    root = write.write_fastdepth(tmp_path / "h5")
    put(root / "train" / "room_0001" / "00001.h5", write.h5(image, np.zeros_like(depth)))
    (root / "mine.txt").write_text("train/room_0001/00000.h5\n\ntrain/room_0001/00001.h5\n")
    data = open_depth_data(root, "mine.txt", kind="fastdepth")
    (line,) = DepthTrainingSet(data, still(), 0)[0, 1]["failed"]
    assert re.search(r"00001\.h5: .*no reading at all.*mine\.txt, line 3", line)


@pytest.mark.real_data
def test_real_layouts(real_data: Path) -> None:
    raw = open_depth_data(real_data / "nyu_16bit_raw_train")
    assert len(raw) == 3
    assert 0.02 < (raw[0].metres == 0).mean() < 0.6
    kitti = open_depth_data(real_data / "kitti_depth3", depth_scale=1 / 256)
    assert len(kitti) == 3
    readings = kitti[0].metres[kitti[0].metres > 0]
    assert 1.5 < readings.min() < 10 < readings.max() < 90
    kitchen = open_depth_data(real_data / "sevenscenes_redkitchen", kind="folder")
    assert len(kitchen) == 48
    nyu = open_depth_data(real_data / "nyu", "nyu_train.txt", labels=LabelOptions())
    labels = nyu[0].labels
    assert labels is not None
    assert set(np.unique(labels)) <= {*range(13), 255}
