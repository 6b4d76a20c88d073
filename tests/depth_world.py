"""A tiny RGB-D data set in the NYU "sync" layout whose depth can be read off its colours, for the tests of depth."""

from pathlib import Path

import cv2
import numpy as np


def make_depth_world(root: Path, train: int = 6, val: int = 2, size: tuple[int, int] = (48, 64)) -> Path:
    """Write pairs of `size` (H, W) with the lists nyu_train.txt and nyu_val.txt; near is bright; returns `root`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        lines = []
        for number in range(count):
            depth = np.full(size, rng.uniform(4, 8), np.float32)
            for _ in range(4):
                top, left = (int(rng.integers(0, 3 * side // 4)) for side in size)
                depth[top : top + size[0] // 3, left : left + size[1] // 3] = rng.uniform(1, 7)
            image = (255 * (1 - depth / 10))[..., None].repeat(3, 2) + rng.normal(0, 3, (*size, 3))
            depth[: size[0] // 10, : size[1] // 10] = 0  # a hole
            folder = root / f"{split}_scene"
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f"rgb_{number:04d}.png"), image.clip(0, 255).astype(np.uint8))
            cv2.imwrite(str(folder / f"sync_depth_{number:04d}.png"), np.rint(depth * 1000).astype(np.uint16))
            name = f"/{split}_scene"
            lines.append(f"{name}/rgb_{number:04d}.png {name}/sync_depth_{number:04d}.png 518.8579\n")
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return root
