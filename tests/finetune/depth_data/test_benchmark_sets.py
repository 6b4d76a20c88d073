"""KITTI, iBims-1 and ReDWeb as they lie on disk: what is read is what was written, and bad files are named."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from finetune.depth_data import DepthFileError, open_depth_data, recognise
from tests import depth_layouts as write
from tests.depth_layouts import DRIVE, SIZE, png, put, scene

# --- KITTI with maps of the depth benchmark


def test_frames_without_a_map_are_counted_and_left_out(tmp_path: Path) -> None:
    data = open_depth_data(write.write_kitti(tmp_path), "eigen.txt")
    assert "4 of the 5 frames" in repr(data)
    assert data.names()[1] == f"{DRIVE}/image_02/data/0000000005.png"
    assert data.origin(3) == " (eigen.txt, line 4)"


@pytest.mark.parametrize(("images", "depths"), [("raw", "gts"), ("input", "train"), ("", "gts/val")])
def test_where_frames_and_maps_may_lie(tmp_path: Path, images: str, depths: str) -> None:
    root = write.write_kitti(tmp_path)
    shutil.move(root / "2011_09_26", root / "moved")
    (root / images).mkdir(exist_ok=True)
    shutil.move(root / "moved", root / images / "2011_09_26")
    (root / depths).parent.mkdir(exist_ok=True)
    shutil.move(root / "data_depth_annotated" / "val", root / depths)
    sample = open_depth_data(root, "eigen.txt")[2]
    np.testing.assert_allclose(sample.metres, scene(2)[1], atol=0.002)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{drive}/image_02/data/0000000000.png None", "no frame of .* has depth"),
        ("{drive}/image_02/data/0000000000.png", r"line 1: expected `DATE/DRIVE.*got '2011"),
        ("{drive} 69 x", "line 1: expected"),
        ("{drive} 70 l", r"2 of 2 files .* are missing.*0000000070\.png \(line 1\)"),
        ("{drive}/image_02/data/0000000000.png drive/proj_depth/1.png", "1 of 2 files .* are missing"),
        (
            "{drive}/image_02/data/0000000000.png None\n{drive} 0 l",
            "line 2: a list names either maps or laser",
        ),
        ("", "is empty"),
    ],
)
def test_bad_lists(tmp_path: Path, line: str, message: str) -> None:
    root = write.write_kitti(tmp_path)
    (root / "bad.txt").write_text(line.format(drive=DRIVE))
    with pytest.raises(ValueError, match=message):
        open_depth_data(root, "bad.txt", kind="kitti")


def test_a_list_is_needed_and_maps_have_16_bits(tmp_path: Path) -> None:
    root = write.write_kitti(tmp_path)
    with pytest.raises(ValueError, match=r"Eigen's 697: name it \(data.list\).*eigen\.txt"):
        open_depth_data(root, kind="kitti")
    data = open_depth_data(root, "eigen.txt")
    (path,) = root.rglob("groundtruth/image_02/0000000010.png")
    put(path, png(np.full(SIZE, 9, np.uint8)))
    for read in (lambda: data[2], data.check_headers):
        with pytest.raises(
            DepthFileError, match=r"0000000010\.png: .*expected 16.bit.*\(eigen\.txt, line 3\)"
        ):
            read()


@pytest.mark.real_data
def test_a_real_frame_of_the_benchmark(tmp_path: Path, real_data: Path) -> None:
    """The same file as a plain folder reads it, listed as BTS lists it."""
    image, depth = (real_data / "kitti_depth3" / kind / "0000000005.png" for kind in ("rgb", "depth"))
    put(tmp_path / DRIVE / "image_02" / "data" / "0000000005.png", image.read_bytes())
    put(tmp_path / "train" / "drive" / "proj_depth" / "groundtruth" / "5.png", depth.read_bytes())
    (tmp_path / "one.txt").write_text(
        f"{DRIVE}/image_02/data/0000000005.png drive/proj_depth/groundtruth/5.png"
    )
    data = open_depth_data(tmp_path, "one.txt")
    plain = open_depth_data(real_data / "kitti_depth3", depth_scale=1 / 256)
    np.testing.assert_array_equal(data[0].metres, plain[plain.names().index("rgb/0000000005.png")].metres)


# --- KITTI with laser scans


def test_a_laser_scan_is_projected(tmp_path: Path) -> None:
    # fx = 32, cx = 32, cy = 24: a beam at (x ahead, y left, z up) falls on column 32 - 32 y / x, row 24 - 32 z / x
    beams = {
        (4, 0, 0): (23, 31),  # pixels count from 1
        (8, -2, 1): (19, 39),
        (8.1, -2, 1): (19, 39),  # behind the one before
        (2, 1, -1): (39, 15),
        (-4, 0, 0): None,  # behind the scanner
        (2, 5, 0): None,  # beside the image
        (1, 0, 0.75): None,  # column 32, row 0 from 1 on: above the image
    }
    expected = np.zeros(SIZE, np.float32)
    expected[23, 31], expected[19, 39], expected[39, 15] = 4, 8, 2
    root = write.write_kitti_laser(tmp_path, np.array(list(beams), np.float64))
    assert recognise(root, "list.txt") == "kitti"
    data = open_depth_data(root, "list.txt")
    np.testing.assert_array_equal(data[0].metres, expected)
    assert data[0].metres.dtype == np.float32
    assert "projected laser scans" in repr(data)


def test_depth_is_ahead_of_the_scanner_not_of_the_camera(tmp_path: Path) -> None:
    root = write.write_kitti_laser(tmp_path, np.array([[4.27, 0, 0]]))
    path = root / Path(DRIVE).parent / "calib_velo_to_cam.txt"
    path.write_text(path.read_text().replace("T: " + " ".join(["0.000000e+00"] * 3), "T: 0 0 -0.27"))
    depth = open_depth_data(root, "list.txt")[0].metres
    assert depth[23, 31] == np.float32(4.27)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("calib_cam_to_cam.txt", "R_rect_00: 1 0 0 0 1 0 0 0 1\n", r"lack one of R, T, .*P_rect_02"),
        ("calib_velo_to_cam.txt", "R: 1 2 3\nT: 0 0 0\n", "lack one of"),
        ("calib_velo_to_cam.txt", None, r"no file .*calib_velo_to_cam\.txt: laser scans are projected"),
    ],
)
def test_bad_calibrations(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    root = write.write_kitti_laser(tmp_path, np.ones((3, 3)))
    path = root / Path(DRIVE).parent / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_depth_data(root, "list.txt")


def test_bad_scans_and_frames_of_another_size(tmp_path: Path) -> None:
    root = write.write_kitti_laser(tmp_path, np.ones((3, 3)))
    data = open_depth_data(root, "list.txt")
    (image,), (scan,) = root.rglob("0000000069.png"), root.rglob("0000000069.bin")
    scan.write_bytes(scan.read_bytes()[:-3])
    with pytest.raises(
        DepthFileError, match=r"0000000069\.bin: cannot be read as a laser scan.*list\.txt, line 1"
    ):
        data[0]
    put(image, png(scene(0, (24, 32))[0]))
    with pytest.raises(DepthFileError, match="is for images of 48x64, the frame is 24x32"):
        data[0]


def test_exported_depth_is_read_from_arrays_and_never_unpickled(tmp_path: Path) -> None:
    root = write.write_kitti_laser(tmp_path, np.ones((3, 3)))
    (root / DRIVE / "velodyne_points" / "data" / "0000000069.bin").unlink()
    packed = np.empty(1, object)
    packed[0] = scene(0)[1]
    np.savez_compressed(root / "gt_depths.npz", data=packed)
    with pytest.raises(ValueError, match=r"gt_depths\.npz is a pickle of arrays.*000000\.npy"):
        open_depth_data(root, "list.txt")
    (root / "gt_depths").mkdir()
    with pytest.raises(ValueError, match=r"holds 0 depth maps and .* names 1 frames"):
        open_depth_data(root, "list.txt")
    np.save(root / "gt_depths" / "000000.npy", scene(0)[1].astype(np.float64))
    data = open_depth_data(root, "list.txt")
    np.testing.assert_array_equal(data[0].metres, scene(0)[1])
    assert "maps in gt_depths" in repr(data)


# --- iBims-1


def test_masks_make_holes(tmp_path: Path) -> None:
    root = write.write_ibims(tmp_path)
    keep = np.ones(SIZE, np.uint8)
    keep[10:20, 40:] = 0
    put(root / "ibims1_core_raw" / "mask_invalid" / "room_01.png", png(keep))
    put(root / "ibims1_core_raw" / "mask_transp" / "room_01.png", png(keep[:, ::-1].copy()))
    data = open_depth_data(root)
    expected = np.where((keep * keep[:, ::-1]) > 0, scene(1)[1], 0)
    np.testing.assert_allclose(data[1].metres, expected, atol=25 / 65535 + 1e-6)
    assert (data[1].metres == 0).sum() == (expected == 0).sum() > 0


def test_edges_planes_and_camera(tmp_path: Path) -> None:
    root = write.write_ibims(tmp_path)
    for where in (root, root / "ibims1_core_raw"):  # either folder is the root
        assert recognise(where) == "ibims"
        geometry = open_depth_data(where)[0].geometry
        assert geometry is not None
        assert geometry.camera == (70, 71, 31, 23)
        assert geometry.edges.sum() == 20
        assert geometry.edges.dtype == bool
        assert [(plane.surface, int(plane.mask.sum())) for plane in geometry.planes] == [
            *(("wall", 20 * 30), ("wall", 20 * 34), ("floor", 18 * 64))
        ]
        assert [plane.normal.tolist() for plane in geometry.planes] == [[0, -1, 0], [1, 0, 0], [0, 0, 1]]


def test_without_the_other_archive_there_is_depth_only(tmp_path: Path) -> None:
    data = open_depth_data(write.write_ibims(tmp_path, geometry=False))
    assert data[0].geometry is None
    assert "without edges and planes" in repr(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw, mats: (raw / "imagelist.txt").unlink(), r"no imagelist\.txt in"),
        (lambda raw, mats: (raw / "imagelist.txt").write_text("\n"), "is empty"),
        (
            lambda raw, mats: (raw / "mask_transp" / "room_02.png").unlink(),
            r"1 of 16 files .*room_02\.png \(line 3\)",
        ),
        (lambda raw, mats: (mats / "room_03.mat").unlink(), r"of 3 of 4 scenes, room_03\.mat is missing"),
        (
            lambda raw, mats: (mats / "room_00.mat").write_bytes(b"x" * 200),
            r"room_00\.mat: holds no struct `data`",
        ),
        (lambda raw, mats: savemat(mats / "room_00.mat", {"data": {"edges": 1}}), "holds no struct `data`"),
        (lambda raw, mats: other_edges(mats / "room_00.mat"), r"room_00\.mat: has maps of .*\(3, 4\)"),
        (
            lambda raw, mats: put(raw / "mask_invalid" / "room_00.png", png(np.ones((3, 4), np.uint8))),
            r"room_00\.png: the mask is 3x4, the depth map 48x64 \(imagelist\.txt, line 1\)",
        ),
        (
            lambda raw, mats: put(raw / "depth" / "room_00.png", png(np.ones(SIZE, np.uint8))),
            r"room_00\.png: the depth map is uint8, expected 16.bit",
        ),
    ],
)
def test_bad_scenes(tmp_path: Path, harm: Any, message: str) -> None:
    root = write.write_ibims(tmp_path)
    harm(root / "ibims1_core_raw", root / "ibims1_core_mat")
    with pytest.raises(ValueError, match=message):
        open_depth_data(root)


def other_edges(path: Path) -> None:
    data = loadmat(path)["data"][0, 0]
    savemat(path, {"data": {**{name: data[name] for name in data.dtype.names}, "edges": np.ones((3, 4))}})


# --- ReDWeb


def test_a_list_of_photos(tmp_path: Path) -> None:
    root = write.write_redweb(tmp_path)
    (root / "held_out.txt").write_text("0002.jpg\nImgs/0000\n")
    assert recognise(root, "held_out.txt") == "redweb"
    data = open_depth_data(root, "held_out.txt", "test")
    assert data.names() == ["0002.jpg", "0000.jpg"]
    assert len(open_depth_data(root, split="test")) == 4
    put(root / "RDs" / "0000.png", png(np.ones(SIZE, np.uint16)))
    with pytest.raises(
        DepthFileError, match=r"0000\.png: relative depth .* has 8 bits.*\(held_out\.txt, line 2\)"
    ):
        data[1]
    (root / "held_out.txt").write_text("0002\n0009\n")
    with pytest.raises(ValueError, match=r"2 of 4 files .* are missing, the first is .*0009\.jpg \(line 2\)"):
        open_depth_data(root, "held_out.txt")


# --- pairs of NYU


def test_pairs_of_nyu(tmp_path: Path) -> None:
    root = write.write_nyu_pairs(tmp_path)
    assert recognise(root, "points.csv") == "nyu_pairs"
    data = open_depth_data(root, "points.csv")
    assert data.names() == ["imgs/0.png", "imgs/1.png"]
    assert "2 images with 8 pairs" in repr(data)
    sample, depth = data[1], scene(1)[1]
    assert sample.pairs is not None
    assert sample.relation is not None
    assert sample.pairs[:2].tolist() == [[0, 63, 47, 0], [1, 63, 47, 1]]  # counted from 0
    y1, x1, y2, x2 = sample.pairs[0].astype(int)
    assert sample.relation[0] == np.sign(depth[y1, x1] - depth[y2, x2]) != 0
    assert sample.relation[3] == 0
    np.testing.assert_array_equal(sample.image, scene(1)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("header\n", "is empty"),
        ("header\nimgs/0.png,0,2\n1,2,3,4,>\n", r"points\.csv, line 2: expected `IMAGE,ANYTHING,N`.*imgs/0"),
        ("header\nimgs/0.png,0,1\n1,2,3,4,?\n", "line 2: expected"),
        ("header\nimgs/0.png\n1,2,3,4,>\n", "line 2: expected"),
        ("header\nimgs/7.png,0,1\n1,2,3,4,>\n", r"1 of 1 files .*7\.png \(line 2\)"),
        ("header\nimgs/0.png,0,1\n1,2,49,4,>\n", r"lies outside the image of 48x64.*points\.csv, line 2"),
    ],
)
def test_bad_pairs_of_nyu(tmp_path: Path, text: str, message: str) -> None:
    root = write.write_nyu_pairs(tmp_path)
    (root / "points.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_depth_data(root, "points.csv", kind="nyu_pairs")
