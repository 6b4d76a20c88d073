"""Small data sets of depth, written in exactly the layouts of the field, of the scenes of one generator."""

import io
import tarfile
import zipfile
from pathlib import Path

import cv2
import h5py
import numpy as np
from scipy.io import savemat

SIZE = (48, 64)


def scene(number: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [H, W, 3] without any symmetry, near is bright, and its depth float32 [H, W] [m] with a hole."""
    rng = np.random.default_rng(number)
    height, width = size
    rows = np.linspace(0, 1, height)[:, None]
    depth = (6 - 3 * rows + rng.uniform(-0.5, 0.5)).repeat(width, 1).astype(np.float32)  # the floor is below
    for _ in range(3):
        top, left = int(rng.integers(0, height // 2)), int(rng.integers(0, 2 * width // 3))
        depth[top : top + height // 3, left : left + width // 4] = rng.uniform(1, 4)
    image = (255 * (1 - depth / 10))[..., None] + rng.normal(0, 4, (*size, 3))
    depth[: height // 8, : width // 8] = 0
    depth = np.rint(depth * 1000).astype(np.float32) / 1000  # whole millimetres
    return image.clip(0, 255).astype(np.uint8), depth


def png(array: np.ndarray) -> bytes:
    """As a PNG; colours are RGB."""
    return cv2.imencode(".png", array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


def millimetres(depth: np.ndarray) -> np.ndarray:
    return np.rint(depth * 1000).astype(np.uint16)


def h5(image: np.ndarray, depth: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["rgb"], file["depth"] = image.transpose(2, 0, 1), depth.astype(np.float32)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def pfm(depth: np.ndarray) -> bytes:
    height, width = depth.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode() + depth[::-1].astype("<f4").tobytes()


def class_map(size: tuple[int, int] = SIZE) -> np.ndarray:
    """Numbers of the 13 classes, uint8 [H, W], 0 = void in the first row, 1 to 13 in columns."""
    labels = 1 + np.arange(size[1]) * 13 // size[1]
    return np.where(np.arange(size[0])[:, None] == 0, 0, labels).astype(np.uint8)


def write_sync(root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = SIZE) -> Path:
    """BTS "sync" with the lists nyu_train.txt and nyu_val.txt, and classes."""
    for split, first, count in (("train", 0, train), ("val", 100, val)):
        lines = []
        for number in range(first, first + count):
            image, depth = scene(number, size)
            folder, text = f"{split}_room", f"{number:04d}"
            put(root / folder / f"rgb_{text}.png", png(image))
            put(root / folder / f"sync_depth_{text}.png", png(millimetres(depth)))
            put(root / folder / f"labels13_{text}.png", png(class_map(size)))
            lines.append(f"/{folder}/rgb_{text}.png /{folder}/sync_depth_{text}.png 518.8579\n")
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return root


def write_labeled(root: Path, count: int = 6) -> Path:
    """The official labelled file: axes reversed, odd images train, with classMapping40.mat."""
    root.mkdir(parents=True, exist_ok=True)
    images, depths = (np.stack(arrays) for arrays in zip(*map(scene, range(count)), strict=True))
    labels = np.stack([class_map().astype(np.uint16)] * count)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["rawDepths"] = depths.transpose(0, 2, 1)
        file["depths"] = np.where(depths == 0, 5, depths).astype(np.float32).transpose(0, 2, 1)
        file["labels"] = labels.transpose(0, 2, 1)
    numbers = np.arange(1, count + 1, dtype=np.uint16)
    savemat(root / "splits.mat", {"trainNdxs": numbers[::2, None], "testNdxs": numbers[1::2, None]})
    # class n of 894 is class n of 40, up to 40; the rest is 40
    savemat(
        root / "classMapping40.mat", {"mapClass": np.minimum(np.arange(1, 895), 40).astype(np.uint8)[None]}
    )
    return root


def densedepth_files(train: int = 4, test: int = 2) -> dict[str, bytes]:
    files, rows = {}, {"train": [], "test": []}
    for number in range(train):
        image, depth = scene(number)
        name = f"data/nyu2_train/room_0001_out/{number + 1}"
        files[f"{name}.jpg"] = png(image)  # read by content, as JPEG would be
        files[f"{name}.png"] = png(np.rint(depth * 25.5).astype(np.uint8))
        rows["train"].append(f"{name}.jpg,{name}.png")
    for number in range(test):
        image, depth = scene(100 + number)
        name = f"data/nyu2_test/{number:05d}"
        files[f"{name}_colors.png"], files[f"{name}_depth.png"] = png(image), png(millimetres(depth))
        rows["test"].append(f"{name}_colors.png,{name}_depth.png")
    for split, lines in rows.items():
        files[f"data/nyu2_{split}.csv"] = "\n".join(lines).encode()
    return files


def write_densedepth(root: Path, zipped: bool = True) -> Path:
    """nyu_data.zip, or what it unpacks to; returns the zip or the folder."""
    root.mkdir(parents=True, exist_ok=True)
    if not zipped:
        for name, content in densedepth_files().items():
            put(root / name, content)
        return root
    with zipfile.ZipFile(root / "nyu_data.zip", "w") as archive:
        for name, content in densedepth_files().items():
            archive.writestr(name, content)
    return root / "nyu_data.zip"


def write_densedepth_test(root: Path, zipped: bool = True, count: int = 2) -> Path:
    """nyu_test.zip with the arrays of the test images, compressed, or what it unpacks to."""
    root.mkdir(parents=True, exist_ok=True)
    images, depths = (
        np.stack(arrays) for arrays in zip(*(scene(100 + n) for n in range(count)), strict=True)
    )
    arrays = {"rgb": images, "depth": depths, "crop": np.array([2, 45, 2, 61])}
    for name, array in arrays.items():
        np.save(root / f"eigen_test_{name}.npy", array)
    if not zipped:
        return root
    with zipfile.ZipFile(root / "nyu_test.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in arrays:
            path = root / f"eigen_test_{name}.npy"
            archive.write(path, path.name)
            path.unlink()
    return root / "nyu_test.zip"


def write_fastdepth(root: Path, train: int = 4, val: int = 2) -> Path:
    for number in range(train):
        put(root / "train" / "room_0001" / f"{number:05d}.h5", h5(*scene(number)))
    for number in range(val):
        put(root / "val" / "official" / f"{number:05d}.h5", h5(*scene(100 + number)))
    return root


def write_hub_tars(root: Path, train: int = 4, val: int = 2) -> Path:
    """data/train-000000.tar, data/train-000001.tar, data/val-000000.tar."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    shards = {"train-000000": range(train // 2), "train-000001": range(train // 2, train)}
    for shard, numbers in {**shards, "val-000000": range(100, 100 + val)}.items():
        with tarfile.open(root / "data" / f"{shard}.tar", "w") as archive:
            for number in numbers:
                content = h5(*scene(number))
                entry = tarfile.TarInfo(f"room/{number:05d}.h5")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return root


def write_diw(root: Path, train: int = 4) -> Path:
    """DIW_train_val.csv; A is the point on the farther side, marked >, as in the code of the authors."""
    lines = []
    for number in range(train):
        image, depth = scene(number)
        put(root / "DIW_train_val" / f"{number}.thumb", png(image))
        known = np.argwhere(depth > 0)
        far, near = (known[choose(depth[depth > 0])] + 1 for choose in (np.argmax, np.argmin))
        first, second, relation = (far, near, ">") if number % 2 else (near, far, "<")
        lines += [
            f"./DIW_train_val/{number}.thumb",
            f"{first[0]},{first[1]},{second[0]},{second[1]},{relation},{SIZE[1]},{SIZE[0]}",
        ]
    (root / "DIW_train_val.csv").write_text("\n".join(lines) + "\n")
    return root


def write_redweb(root: Path, count: int = 4) -> Path:
    for number in range(count):
        image, depth = scene(number)
        put(root / "Imgs" / f"{number:04d}.jpg", png(image))
        far = np.rint(depth * 25).astype(np.uint8)  # near = 0
        far[depth == 0] = 255
        put(root / "RDs" / f"{number:04d}.png", png(far))
    return root


def write_folder(root: Path, kind: str = "png", train: int = 4, val: int = 2) -> Path:
    """train/rgb/0000.png with train/depth/0000.KIND, and val; PNG in units of 1/256 m."""
    for split, first, count in (("train", 0, train), ("val", 100, val)):
        for number in range(first, first + count):
            image, depth = scene(number)
            put(root / split / "rgb" / f"{number:04d}.png", png(image))
            path = root / split / "depth" / f"{number:04d}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "png":
                path.write_bytes(png(np.rint(depth * 256).astype(np.uint16)))
            elif kind == "npy":
                np.save(path, depth)
            else:
                path.write_bytes(pfm(depth))
    return root


DRIVE = "2011_09_26/2011_09_26_drive_0002_sync"


def write_kitti(root: Path, count: int = 4, size: tuple[int, int] = SIZE) -> Path:
    """Frames with maps of the depth benchmark, and eigen.txt as BTS has it, with one frame more that has no map."""
    lines = []
    for number in range(count + 1):
        image, depth = scene(number, size)
        text = f"{5 * number:010d}"
        put(root / DRIVE / "image_02" / "data" / f"{text}.png", png(image))
        depth_name = f"{Path(DRIVE).name}/proj_depth/groundtruth/image_02/{text}.png"
        if number < count:
            put(
                root / "data_depth_annotated" / "val" / depth_name,
                png(np.rint(depth * 256).astype(np.uint16)),
            )
        listed = depth_name if number < count else "None"
        lines.append(f"{DRIVE}/image_02/data/{text}.png {listed} 721.5377\n")
    (root / "eigen.txt").write_text("".join(lines))
    return root


def write_kitti_laser(root: Path, points: np.ndarray, size: tuple[int, int] = SIZE) -> Path:
    """One frame with a laser scan of `points` (x ahead, y left, z up) [m], its calibration, and list.txt as Monodepth2
    has it. The scanner looks along the camera and stands where it does; fx = fy = 32, and cx, cy the middle."""
    image, _ = scene(0, size)
    put(root / DRIVE / "image_02" / "data" / "0000000069.png", png(image))
    scan = np.concatenate([points, np.full((len(points), 1), 0.3)], 1).astype("<f4")
    put(root / DRIVE / "velodyne_points" / "data" / "0000000069.bin", scan.tobytes())
    day = root / Path(DRIVE).parent
    project = [32, 0, size[1] / 2, 0, 0, 32, size[0] / 2, 0, 0, 0, 1, 0]
    cameras = {"R_rect_00": np.eye(3).ravel(), "S_rect_02": size[::-1], "P_rect_02": project}
    scanner = {"R": [0, -1, 0, 0, 0, -1, 1, 0, 0], "T": [0, 0, 0]}
    for name, lines in (("calib_cam_to_cam", cameras), ("calib_velo_to_cam", scanner)):
        rows = [f"{key}: {' '.join(f'{value:.6e}' for value in values)}" for key, values in lines.items()]
        (day / f"{name}.txt").write_text("\n".join(["calib_time: 09-Jan-2012 13:57:47", *rows]) + "\n")
    (root / "list.txt").write_text(f"{DRIVE} 69 l\n")
    return root


def write_ibims(root: Path, count: int = 4, size: tuple[int, int] = SIZE, geometry: bool = True) -> Path:
    """ibims1_core_raw with imagelist.txt, and ibims1_core_mat with edges and, of each kind, two walls and a floor."""
    names = [f"room_{number:02d}" for number in range(count)]
    raw, mats = root / "ibims1_core_raw", root / "ibims1_core_mat"
    mats.mkdir(parents=True)
    for number, name in enumerate(names):
        image, depth = scene(number, size)
        put(raw / "rgb" / f"{name}.png", png(image))
        put(raw / "depth" / f"{name}.png", png(np.rint(depth * 65535 / 50).astype(np.uint16)))
        put(raw / "calib" / f"{name}.txt", b"70.0,71.0,31.0,23.0")
        for mask in ("mask_invalid", "mask_transp"):
            put(raw / mask / f"{name}.png", png(np.full(size, 255, np.uint8)))
        walls, floor, edges = (np.zeros(size, np.uint8) for _ in range(3))
        walls[:20, :30], walls[:20, 30:], floor[30:], edges[:20, 30] = 1, 2, 1, 1
        data = {
            "edges": edges,
            "calib": np.array([[70.0, 0, 0], [0, 71, 0], [31, 23, 1]]),
            "mask_wall": walls,
            "mask_wall_paras": np.array([[0, 0, 0, 0, 0, -1, 0, 3.0], [0, 0, 0, 0, 1, 0, 0, 3]]),
            "mask_floor": floor,
            "mask_floor_paras": np.array([[0, 0, 0, 0, 0, 0, 1, 1.5]]),
            "mask_table": np.zeros(size, np.uint8),
            "mask_table_paras": np.zeros((0, 0)),
        }
        if geometry:
            savemat(mats / f"{name}.mat", {"data": data})
    (raw / "imagelist.txt").write_text("\n".join(names) + "\n")
    return root


def write_nyu_pairs(root: Path, count: int = 2, size: tuple[int, int] = SIZE) -> Path:
    """points.csv as Chen et al. 2016 have it, with the first 3 rows of each image against its last: nearer ones there,
    and two points of one row that are as far."""
    lines = ["a header,that nobody,reads"]
    for number in range(count):
        image, depth = scene(number, size)
        depth[: size[0] // 8, : size[1] // 8] = 9  # the hole
        put(root / "imgs" / f"{number}.png", png(image))
        pairs = [(row, size[1] - 1, size[0] - 1, row) for row in range(3)] + [(0, 0, 0, 1)]
        lines.append(f"../../data/imgs/{number}.png,{number},{len(pairs)}")
        for a, b, c, d in pairs:
            difference = depth[a, b] - depth[c, d]
            sign = ">" if difference > 0 else "<" if difference < 0 else "="
            lines.append(f"{a + 1},{b + 1},{c + 1},{d + 1},{sign}")
    (root / "points.csv").write_text("\n".join(lines) + "\n")
    return root
