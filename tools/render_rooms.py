"""Render a small RGB-D world of furnished rooms, laid out on disk as NYU Depth V2 is.

    python tools/render_rooms.py --output runs/rooms --scenes 60 --views 5 --unlabeled 300 --size 120 160

A ray caster in numpy: rooms are boxes seen from inside, furniture is made of boxes, ellipsoids and frustums,
surfaces carry procedural textures, one to three lights cast shadows, and the camera has the field of view of the NYU
sensor. Depth is z-depth, the distance along the optical axis, of the ray through the centre of each pixel. It is an
intersection in double precision and not a measurement: it has no holes, and no noise beyond the rounding to 1 mm.

Written into --output:

    bedroom_0000/rgb_0000.jpg, bedroom_0000/sync_depth_0000.png      depth: 16-bit PNG in millimetres
    train.txt, test.txt        lines `/scene/rgb_N.jpg /scene/sync_depth_N.png focal`; no scene is in both
    unlabeled/room_00000.jpg   images without depth, of scenes that are in neither list
    rooms.json                 the settings, the intrinsics and the split

The same settings give the same files whatever the number of workers: each scene draws from its own generator.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rooms.camera import intrinsics
from rooms.furniture import ROOMS
from rooms.interior import Builder
from rooms.photo import place_camera, render_depth, render_photo

from spark.errors import FileError, UserError

GENERATOR = 1  # raise it when the same settings give other files than before


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
        if self.scenes < 2 or self.views < 1 or self.unlabeled < 0:
            raise UserError(
                "at least 2 scenes (one to train, one to test) of 1 view are needed, and unlabeled >= 0"
            )
        if self.scenes > 9999 or self.views > 9999:
            raise UserError("scenes and views are numbered with four digits: at most 9999 of each")
        if self.seed < 0:
            raise UserError(f"seed must not be negative, it is {self.seed}")
        if min(self.size) < 16:
            raise UserError(
                f"size {self.size[0]} {self.size[1]} is too small to show a room: at least 16 pixels a side"
            )
        if not 0 < self.test_share < 1:
            raise UserError(f"test_share is a share of the scenes, between 0 and 1, not {self.test_share}")

    @property
    def test_scenes(self) -> int:
        """How many of the scenes are for testing: at least one, and at least one is left for training."""
        return min(max(1, round(self.scenes * self.test_share)), self.scenes - 1)

    def kind(self, index: int) -> str:
        """Kind of room of a scene."""
        return list(ROOMS)[index % len(ROOMS)]

    def split(self) -> dict[str, list[str]]:
        """Folder names of the "train" and "test" scenes; both hold every kind of room where there are enough."""
        by_kind = sorted(range(self.scenes), key=lambda index: (index % len(ROOMS), index))
        steps = [(place + 1) * self.test_scenes // self.scenes for place in range(-1, self.scenes)]
        test = {
            index for index, before, after in zip(by_kind, steps, steps[1:], strict=False) if after > before
        }
        names = [f"{self.kind(index)}_{index:04d}" for index in range(self.scenes)]
        return {
            "train": [name for index, name in enumerate(names) if index not in test],
            "test": [name for index, name in enumerate(names) if index in test],
        }


@dataclass(frozen=True)
class Task:
    """One scene to render: `labeled` with depth and `index` the scene's number, or images only."""

    settings: Settings
    output: str
    labeled: bool
    index: int


def render_scene(task: Task) -> int:
    """Render and write the views of one scene; returns how many. Runs in a worker process."""
    settings, folder = task.settings, Path(task.output)
    stream = (settings.seed, int(task.labeled), task.index)
    kind, first, views = settings.kind(task.index), 0, settings.views
    if task.labeled:
        folder = folder / f"{kind}_{task.index:04d}"
    else:
        folder, first = folder / "unlabeled", task.index * settings.views
        views = min(views, settings.unlabeled - first)
    folder.mkdir(exist_ok=True)
    room = Builder(kind, np.random.default_rng((*stream, 0))).build()
    for view in range(views):
        rng = np.random.default_rng((*stream, 1 + view))
        camera = place_camera(room, rng)
        photo = Image.fromarray(render_photo(room, camera, settings.size, rng))
        name = f"rgb_{view:04d}.jpg" if task.labeled else f"room_{first + view:05d}.jpg"
        photo.save(folder / name, quality=92)
        if task.labeled:
            write_depth(folder / f"sync_depth_{view:04d}.png", render_depth(room, camera, settings.size))
    return views


def write_depth(path: Path, depth: np.ndarray) -> None:
    """Write depth [m] as a 16-bit PNG in millimetres, as NYU's "sync" layout has it."""
    if not cv2.imwrite(str(path), np.round(depth * 1000).astype(np.uint16)):
        raise FileError(f"could not write {path}: is the disk full or the folder read-only?")


def claim_folder(output: Path, settings: Settings) -> bool:
    """Make the output folder ours; True when it already holds exactly these rooms, whole.

    Raises:
        ValueError: the folder holds something else; nothing in it is touched.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: --output is a folder")
    card = output / "rooms.json"
    if output.is_dir() and any(output.iterdir()):
        try:
            found = json.loads(card.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"{output} is not empty and was not made by this tool: choose another --output, or empty it yourself"
            ) from None
        if found != describe(settings)["settings"]:
            raise UserError(
                f"{output} holds rooms of other settings ({found}): choose another --output, or delete that folder"
            )
        return (output / "train.txt").is_file() and (output / "test.txt").is_file()
    output.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps(describe(settings), indent=2) + "\n", encoding="utf-8")
    return False


def describe(settings: Settings) -> dict:
    """What rooms.json says."""
    fx, fy, cx, cy = intrinsics(settings.size)
    return {
        "made_by": "tools/render_rooms.py",
        "settings": {"generator": GENERATOR, **asdict(settings), "size": list(settings.size)},
        "intrinsics": {"fx": fx, "fy": fy, "cx": cx, "cy": cy},
        "depth": "z-depth at pixel centres, 16-bit PNG, millimetres",
        "scenes": settings.split(),
    }


def write_lists(output: Path, settings: Settings) -> None:
    """Write train.txt and test.txt; they come last, so a folder that has them is whole."""
    focal = intrinsics(settings.size)[0]
    for name, scenes in settings.split().items():
        lines = [
            f"/{scene}/rgb_{view:04d}.jpg /{scene}/sync_depth_{view:04d}.png {focal:.4f}\n"
            for scene in scenes
            for view in range(settings.views)
        ]
        partial = output / f".{name}.txt.part"
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, output / f"{name}.txt")


def render(output: str | Path, settings: Settings, workers: int | None = None, show: bool = True) -> dict:
    """Render the whole world into a folder.

    A folder that already holds these rooms is left as it is; one that was interrupted is rendered again.

    Args:
        output: new or empty folder, or one that this function made from the same settings.
        settings: what to render.
        workers: processes; None takes one for each core this process may use.
        show: print progress.

    Returns:
        The contents of rooms.json.

    Raises:
        ValueError: the folder holds something else, or the settings make no sense.
    """
    output = Path(output)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    if claim_folder(output, settings):
        if show:
            print(f"{output} already holds these rooms: nothing to do")
        return describe(settings)
    extra = math.ceil(settings.unlabeled / settings.views)
    tasks = [Task(settings, str(output), True, i) for i in range(settings.scenes)]
    tasks += [Task(settings, str(output), False, i) for i in range(extra)]
    total = settings.scenes * settings.views + settings.unlabeled
    start = time.monotonic()
    if workers == 1:
        report_progress(map(render_scene, tasks), total, start, show)
    else:
        with ProcessPoolExecutor(workers) as pool:
            report_progress(pool.map(render_scene, tasks), total, start, show)
    write_lists(output, settings)
    return describe(settings)


def report_progress(counts: Iterable[int], total: int, start: float, show: bool) -> None:
    """Consume the scenes' image counts; redraw one line on a terminal, print a line every tenth otherwise."""
    done, shown, live = 0, 0, sys.stdout.isatty()
    for count in counts:
        done += count
        tenth = 10 * done // total
        if not show or not (live or tenth > shown):
            continue
        shown = tenth
        seconds = time.monotonic() - start
        left = seconds / done * (total - done)
        text = f"{done}/{total} images, {done / seconds:.1f} images/s, {left:.0f} s left"
        print(f"\r{text}  " if live else text, end="" if live and done < total else "\n", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description="Render furnished rooms with exact metric depth, laid out on disk as NYU Depth V2 (BTS sync) is."
    )
    parser.add_argument(
        "--output", required=True, help="folder to write; new, empty, or made by this tool before"
    )
    parser.add_argument("--scenes", type=int, default=default.scenes, help="scenes with depth (%(default)s)")
    parser.add_argument("--views", type=int, default=default.views, help="images of each scene (%(default)s)")
    parser.add_argument(
        "--unlabeled", type=int, default=default.unlabeled, help="images without depth (%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=default.size, metavar=("H", "W"), help="pixels (120 160)"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="another seed, another world (%(default)s)"
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=default.test_share,
        help="share of scenes in test.txt (%(default)s)",
    )
    parser.add_argument("--workers", type=int, help="processes (one a core); the files do not depend on it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    try:
        settings = Settings(
            args.scenes, args.views, args.unlabeled, tuple(args.size), args.seed, args.test_share
        )
        card = render(args.output, settings, args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"render_rooms: {error}")
    train, test = (len(card["scenes"][name]) for name in ("train", "test"))
    print(
        f"{args.output}: {train} training and {test} test scenes of {settings.views} views,"
        f" {settings.unlabeled} unlabeled images, {settings.size[0]}x{settings.size[1]}"
    )


if __name__ == "__main__":
    main()
