"""Depth maps as NPY, PFM and 16-bit PNG: what is written is what is read, by us and by other readers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from finetune.depth_data.depth_files import (
    npy_bytes,
    pfm_bytes,
    png_bytes,
    read_depth_file,
    stored_scale,
    to_units,
)
from finetune.depth_data.sample import DepthFileError

DEPTH = np.array([[0.5, 1.2343, 2.0], [3.25, 79.9, 64.0]], np.float32)


def test_float_files_are_exact_and_others_read_them(tmp_path: Path) -> None:
    for extension, content in ((".npy", npy_bytes(DEPTH)), (".pfm", pfm_bytes(DEPTH))):
        path = tmp_path / f"x{extension}"
        path.write_bytes(content)
        np.testing.assert_array_equal(read_depth_file(path), DEPTH)
        np.testing.assert_array_equal(read_depth_file(path, 0.5), DEPTH / 2)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "x.pfm"), cv2.IMREAD_UNCHANGED), DEPTH)


@pytest.mark.parametrize("scale", [0.001, 1 / 256, 0.005])
def test_png_says_its_scale_to_any_reader(tmp_path: Path, scale: float) -> None:
    path = tmp_path / "x.PNG"
    content, saturated = png_bytes(DEPTH, scale)
    path.write_bytes(content)
    with Image.open(path) as image:
        assert float(image.info["depth_scale"]) == scale
        units = np.asarray(image)
    np.testing.assert_array_equal(units, cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    assert stored_scale(path) == scale
    assert saturated == (scale == 0.001)
    inside = units < 65535
    assert np.abs(read_depth_file(path) - DEPTH)[inside].max() <= scale / 2 * 1.001
    np.testing.assert_allclose(read_depth_file(path, 1.0), units)


def test_what_is_no_depth_becomes_no_reading() -> None:
    depth = np.array([[np.nan, -1.0, 0.0, np.inf, 0.0004, 0.0006, 70.0]], np.float32)
    units, saturated = to_units(depth)
    assert units.tolist() == [[0, 0, 0, 0, 0, 1, 65535]]
    assert saturated == 1


def test_bad_files_are_sentences(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, reason: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DepthFileError, match=reason) as caught:
            read_depth_file(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")

    plain = cv2.imencode(".png", np.ones((2, 3), np.uint16))[1].tobytes()
    refused("a.png", plain, "does not say the metres of one unit")
    refused("b.png", plain[:40], "cannot be read")
    (tmp_path / "c.png").write_bytes(cv2.imencode(".png", np.ones((2, 3), np.uint8))[1].tobytes())
    with pytest.raises(DepthFileError, match="uint8, expected 16-bit"):
        read_depth_file(tmp_path / "c.png", 0.001)
    refused("d.exr", plain, "is no depth map")
    refused("e.npy", npy_bytes(np.ones((1, 2, 3))), r"depth is numbers \[H, W\]")
    refused("f.pfm", pfm_bytes(DEPTH)[:-1], "cut short")
    refused("g.npy", b"", "cannot be read")
    with pytest.raises(DepthFileError, match="cannot be read"):
        read_depth_file(tmp_path / "missing.npy")
    (tmp_path / "h.png").write_bytes(
        png_bytes(DEPTH)[0].replace(b"depth_scale\x000.001", b"depth_scale\x00xxxxx")
    )
    with pytest.raises(DepthFileError):
        read_depth_file(tmp_path / "h.png")
    np.savez(tmp_path / "i.npz", DEPTH)
    (tmp_path / "i.npz").rename(tmp_path / "i.npy")
    with pytest.raises(DepthFileError, match="archive of arrays"):
        read_depth_file(tmp_path / "i.npy")
