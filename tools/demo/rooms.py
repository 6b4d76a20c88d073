"""Render a small RGB-D world of furnished rooms, laid out on disk as NYU Depth V2 is.

    python -m tools.demo.rooms --output runs/rooms --scenes 60 --views 5 --unlabeled 300 --size 120 160

A ray caster in numpy: rooms are boxes seen from inside, furniture is made of boxes, ellipsoids and frustums,
surfaces carry procedural textures, lights cast shadows, and the camera has the field of view of the NYU sensor.
Depth is z-depth, the distance along the optical axis, of the ray through the centre of each pixel: an intersection in
double precision, without holes, and without noise beyond the rounding to 1 mm.

Written into --output:

    bedroom_0000/rgb_0000.jpg, bedroom_0000/sync_depth_0000.png      depth: 16-bit PNG in millimetres
    train.txt, test.txt        lines `/scene/rgb_N.jpg /scene/sync_depth_N.png focal`; no scene is in both
    unlabeled/room_00000.jpg   images without depth, of scenes that are in neither list
    rooms.json                 the settings, the intrinsics and the split

The same settings give the same files for any number of workers: each scene draws from its own generator.
"""

import argparse
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from spark.errors import FileError, UserError
from spark.files import write_whole
from spark.training.accelerator import usable_cores
from tools.demo.furniture import ROOMS, furnish
from tools.demo.photo import render_photo
from tools.demo.scene import Camera, Room, intrinsics, random_view, render_depth

GENERATOR = 2  # raise it when the same settings give other files than before


@dataclass(frozen=True)
class Settings:
    """What decides the files, apart from the code.

    Args:
        scenes: scenes with depth.
        views: images of each of them.
        unlabeled: images without depth, of further scenes (`views` images of each).
        size: (H, W) of the images.
        seed: another seed, another world.
        test_share: share of the scenes in test.txt.
    """

    scenes: int = 60
    views: int = 5
    unlabeled: int = 300
    size: tuple[int, int] = (120, 160)
    seed: int = 0
    test_share: float = 0.25

    def __post_init__(self):
        if not (2 <= self.scenes <= 9999 and 1 <= self.views <= 9999 and self.unlabeled >= 0):
            raise UserError(
                "2 to 9999 scenes (at least one to train and one to test) of 1 to 9999 views are needed, "
                "and unlabeled >= 0"
            )
        if self.seed < 0 or min(self.size) < 16 or not 0 < self.test_share < 1:
            raise UserError(
                "seed must not be negative, size at least 16 pixels a side, and test_share between 0 and 1"
            )

    def kind(self, index: int) -> str:
        """Kind of room of a scene."""
        return list(ROOMS)[index % len(ROOMS)]

    def split(self) -> dict[str, list[str]]:
        """Folder names of the "train" and "test" scenes; both hold every kind of room where there are enough."""
        by_kind = sorted(range(self.scenes), key=lambda index: (index % len(ROOMS), index))
        count = min(max(1, round(self.scenes * self.test_share)), self.scenes - 1)
        test = {by_kind[(2 * i + 1) * self.scenes // (2 * count)] for i in range(count)}
        names = [f"{self.kind(index)}_{index:04d}" for index in range(self.scenes)]
        return {
            "train": [name for index, name in enumerate(names) if index not in test],
            "test": [name for index, name in enumerate(names) if index in test],
        }


def scene(
    settings: Settings, labeled: bool, index: int
) -> tuple[Room, list[tuple[Camera, np.random.Generator]]]:
    """A room and its views: the camera of each, and the generator of its photo."""
    stream = (settings.seed, int(labeled), index)
    room = furnish(settings.kind(index), np.random.default_rng((*stream, 0)))
    generators = [np.random.default_rng((*stream, 1 + view)) for view in range(settings.views)]
    return room, [(random_view(room, rng), rng) for rng in generators]


def render_scene(settings: Settings, output: Path, labeled: bool, index: int) -> int:
    """Render and write the views of one scene; returns how many. Runs in a worker process."""
    room, views = scene(settings, labeled, index)
    folder, first = output / f"{settings.kind(index)}_{index:04d}", 0
    if not labeled:
        folder, first = output / "unlabeled", index * settings.views
        views = views[: settings.unlabeled - first]
    folder.mkdir(exist_ok=True)
    for view, (camera, rng) in enumerate(views):
        photo = Image.fromarray(render_photo(room, camera, settings.size, rng))
        name = f"rgb_{view:04d}.jpg" if labeled else f"room_{first + view:05d}.jpg"
        photo.save(folder / name, quality=92)
        if labeled:
            depth = np.round(render_depth(room, camera, settings.size) * 1000).astype(np.uint16)
            path = folder / f"sync_depth_{view:04d}.png"
            if not cv2.imwrite(str(path), depth):
                raise FileError(f"could not write {path}: is the disk full or the folder read-only?")
    return len(views)


def claim_folder(output: Path, card: dict) -> bool:
    """Make the output folder ours; True when it already holds exactly these rooms, whole.

    Raises:
        UserError: the folder holds something else; nothing in it is touched.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: --output is a folder")
    file = output / "rooms.json"
    if output.is_dir() and any(output.iterdir()):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"{output} is not empty and was not made by this tool: choose another --output, or empty it yourself"
            ) from None
        if found != card["settings"]:
            raise UserError(
                f"{output} holds rooms of other settings ({found}): choose another --output, or delete that folder"
            )
        return (output / "train.txt").is_file() and (output / "test.txt").is_file()
    output.mkdir(parents=True, exist_ok=True)
    write_whole(file, (json.dumps(card, indent=2) + "\n").encode())
    return False


def render(output: str | Path, settings: Settings, workers: int | None = None) -> dict:
    """Render the whole world into a folder; one that holds these rooms already is left as it is.

    Args:
        output: new or empty folder, or one that this function made from the same settings.
        settings: what to render.
        workers: processes; None takes one for each core this process may use.

    Returns:
        The contents of rooms.json.

    Raises:
        UserError: the folder holds something else.
    """
    output = Path(output)
    fx, fy, cx, cy = intrinsics(settings.size)
    card = {
        "made_by": "tools/demo/rooms.py",
        "settings": {"generator": GENERATOR, **asdict(settings), "size": list(settings.size)},
        "intrinsics": {"fx": fx, "fy": fy, "cx": cx, "cy": cy},
        "depth": "z-depth at pixel centres, 16-bit PNG, millimetres",
        "scenes": settings.split(),
    }
    if claim_folder(output, card):
        print(f"{output} already holds these rooms: nothing to do")
        return card
    labeled = [True] * settings.scenes + [False] * math.ceil(settings.unlabeled / settings.views)
    indices = [*range(settings.scenes), *range(len(labeled) - settings.scenes)]
    done, total = 0, settings.scenes * settings.views + settings.unlabeled
    with ProcessPoolExecutor(workers or usable_cores()) as pool:
        counts = pool.map(render_scene, [settings] * len(labeled), [output] * len(labeled), labeled, indices)
        for count in counts:
            if 10 * (done + count) // total > 10 * done // total:
                print(f"{done + count}/{total} images", flush=True)
            done += count
    for name, scenes in card["scenes"].items():  # last: a folder that has the lists is whole
        lines = [
            f"/{scene}/rgb_{view:04d}.jpg /{scene}/sync_depth_{view:04d}.png {fx:.4f}\n"
            for scene in scenes
            for view in range(settings.views)
        ]
        write_whole(output / f"{name}.txt", "".join(lines).encode())
    return card


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    default = Settings()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--output", required=True, help="folder to write; new, empty, or made by this tool before")
    add("--scenes", type=int, default=default.scenes, help="scenes with depth (%(default)s)")
    add("--views", type=int, default=default.views, help="images of each scene (%(default)s)")
    add("--unlabeled", type=int, default=default.unlabeled, help="images without depth (%(default)s)")
    add("--size", type=int, nargs=2, default=default.size, metavar=("H", "W"), help="pixels (120 160)")
    add("--seed", type=int, default=default.seed, help="another seed, another world (%(default)s)")
    add("--test_share", type=float, default=default.test_share, help="share of scenes to test (%(default)s)")
    add("--workers", type=int, help="processes (one a core); the files do not depend on it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = vars(parse_arguments(argv))
    output, workers = options.pop("output"), options.pop("workers")
    try:
        settings = Settings(**{**options, "size": tuple(options["size"])})
        card = render(output, settings, workers)
    except (ValueError, OSError) as error:
        sys.exit(f"rooms: {error}")
    train, test = (len(card["scenes"][name]) for name in ("train", "test"))
    print(f"{output}: {train} training and {test} test scenes, {settings.unlabeled} images without depth")


if __name__ == "__main__":
    main()
