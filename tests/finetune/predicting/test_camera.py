"""Intrinsics from wherever they come, and what point clouds and meshes make of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.predicting.camera import NYU, Intrinsics, camera_for, exif_camera, read_camera, wide_view
from finetune.predicting.pointcloud import mesh, point_cloud

CAMERA = Intrinsics(50.0, 40.0, 3.0, 2.0, 6, 8, "a test")


def photo(path: Path, size: tuple[int, int] = (30, 40), **tags: float) -> Path:
    exif = Image.Exif()
    names = {"equivalent": 0xA405, "focal": 0x920A, "plane": 0xA20E, "unit": 0xA210, "width": 0xA002}
    exif.get_ifd(0x8769).update({names[name]: value for name, value in tags.items()})
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path, exif=exif)
    return path


def test_exif_gives_the_focal_length_over_the_diagonal(tmp_path: Path) -> None:
    camera = exif_camera(photo(tmp_path / "a.jpg", equivalent=26), (30, 40))
    assert camera is not None
    assert camera.fx == camera.fy == pytest.approx(26 / math.hypot(36, 24) * 50)
    assert (camera.cx, camera.cy) == (19.5, 14.5)
    assert not camera.assumed
    assert "26 mm equivalent" in str(camera)


def test_exif_of_the_focal_plane_counts_for_the_image_as_taken(tmp_path: Path) -> None:
    tags = {"focal": 5.0, "plane": 100.0, "unit": 3}  # 5 mm, 100 pixels a centimetre
    camera = exif_camera(photo(tmp_path / "a.jpg", width=40, **tags), (30, 40))
    assert camera is not None
    assert camera.fx == pytest.approx(50.0)
    assert exif_camera(photo(tmp_path / "b.jpg", width=4000, **tags), (30, 40)) is None  # resized since
    assert exif_camera(photo(tmp_path / "c.jpg", equivalent=0), (30, 40)) is None


def test_damaged_exif_is_no_camera_and_no_error(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update(
        {0x920A: 5.0, 0xA20E: 100.0, 0xA002: 40, 0xA210: (2, 3)}
    )  # a unit that is two numbers
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert exif_camera(tmp_path / "a.jpg", (30, 40)) is None
    inches = exif_camera(
        photo(tmp_path / "b.jpg", focal=5.0, plane=254.0, width=40), (30, 40)
    )  # no unit: inches
    assert inches is not None
    assert inches.fx == pytest.approx(50.0)


def test_where_nothing_is_known_it_is_assumed_and_said(tmp_path: Path) -> None:
    for size in ((30, 40), (40, 30)):
        camera = camera_for(None, photo(tmp_path / "a.jpg", size), size)
        assert camera.assumed
        assert "ASSUMED" in str(camera)
        assert camera.fx == pytest.approx(20 / math.tan(math.radians(30)))
    stated = camera_for("90", None, (30, 40))
    assert stated.fx == pytest.approx(20.0)
    assert not stated.assumed


def test_files(tmp_path: Path) -> None:
    numbers = {"fx": 50.0, "fy": 40.0, "cx": 3.0, "cy": 2.0, "width": 8, "height": 6}
    (tmp_path / "a.json").write_text(json.dumps(numbers))
    (tmp_path / "b.yaml").write_text("".join(f"{key}: {value}\n" for key, value in numbers.items()))
    for name in ("a.json", "b.yaml"):
        camera = read_camera(tmp_path / name, (60, 80))  # its own size counts
        assert (camera.fx, camera.fy, camera.cx, camera.cy) == (50, 40, 3, 2), name
        assert (camera.height, camera.width) == (6, 8)
    unsized = {key: numbers[key] for key in ("fx", "fy", "cx", "cy")}
    (tmp_path / "c.json").write_text(json.dumps(unsized))
    assert read_camera(tmp_path / "c.json", (6, 8)).width == 8

    for content, message in (
        ("{", "holds no intrinsics"),
        ("{}", "it lacks fx"),
        ("[1]", "holds no intrinsics"),
        (json.dumps(unsized), "it lacks width and height"),
        (json.dumps({**numbers, "fx": -1}), "fx and fy are above 0"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_camera(tmp_path / "bad.json")


def test_resizing_moves_the_middle_of_the_first_pixel() -> None:
    double = CAMERA.at((12, 16))
    assert (double.fx, double.fy) == (100, 80)
    assert (double.cx, double.cy) == (6.5, 4.5)  # two pixels for one: 3 lies between 6 and 7
    with pytest.raises(ValueError, match="are of 6x8, the image is 8x6"):
        CAMERA.at((8, 6))
    assert NYU.relative_focal == pytest.approx(518.858 / 640)


def read_ply(content: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, colours and faces, read with nothing but the format's definition."""
    header, _, body = content.partition(b"end_header\n")
    counts = {
        line.split()[1]: int(line.split()[2]) for line in header.decode().splitlines() if "element" in line
    }
    vertex = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
    points = np.frombuffer(body, vertex, counts["vertex"])
    faces = np.frombuffer(
        body, np.dtype([("n", "u1"), ("i", "<i4", 3)]), counts.get("face", 0), points.nbytes
    )
    assert len(body) == points.nbytes + faces.nbytes
    return points["xyz"], points["rgb"], faces["i"]


def test_points_are_where_the_camera_saw_them() -> None:
    rng = np.random.default_rng(0)
    image, depth = rng.integers(0, 256, (6, 8, 3), np.uint8), rng.uniform(1, 9, (6, 8)).astype(np.float32)
    depth[0, 0], depth[0, 1] = 0, np.nan
    points, colours, _ = read_ply(point_cloud(image, depth, CAMERA))
    assert len(points) == 46
    x, y, z = points[5 * 8 + 7 - 2]  # row 5, column 7
    assert z == -depth[5, 7]
    assert x == pytest.approx((7 - 3) / 50 * depth[5, 7])
    assert y == pytest.approx(-(5 - 2) / 40 * depth[5, 7])
    np.testing.assert_array_equal(colours, image.reshape(-1, 3)[2:])
    thinned, colours, _ = read_ply(point_cloud(image, depth, CAMERA, most=12))
    np.testing.assert_array_equal(colours, image[::2, ::2].reshape(-1, 3)[1:])
    np.testing.assert_allclose(thinned[-1], points[(4 * 8 + 6) - 2])


def test_faces_break_where_depth_jumps() -> None:
    image, depth = np.zeros((6, 8, 3), np.uint8), np.full((6, 8), 2.0, np.float32)
    depth[:, 4:] = 3.0
    points, _, faces = read_ply(mesh(image, depth, CAMERA))
    assert len(faces) == 2 * 5 * (3 + 3)
    corners = points[faces]
    assert (np.ptp(corners[..., 2], axis=1) == 0).all()
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (normals[:, 2] > 0).all()  # they look at the camera
    depth[:] = np.random.default_rng(0).uniform(1, 9, (6, 8))
    depth[0] = np.nan
    assert len(read_ply(mesh(image, depth, CAMERA))[2]) < 20


def test_a_focal_length_in_millimetres_is_doubted() -> None:
    text = wide_view(4.2, 640)
    assert text.startswith("a camera with fx 4.2 px sees 178 degrees across 640 px")
    assert "are these in millimetres?" in text
    assert wide_view(320 / math.tan(math.radians(75.5)), 640)  # 151 degrees
    assert not wide_view(320 / math.tan(math.radians(74.5)), 640)  # 149
    assert not wide_view(NYU.fx, NYU.width)
