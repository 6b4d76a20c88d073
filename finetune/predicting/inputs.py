"""What to predict: the images and videos that a path names, and the names of their outputs."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from finetune.predicting.record import RECORD
from finetune.predicting.video import EXTENSIONS as VIDEO
from finetune.predicting.writers import PICTURES, VIDEO_FORMATS
from spark.errors import UserError
from spark.images.decode import EXTENSIONS as IMAGE
from spark.images.sources.files import list_images, walk


def is_video(source: Path | int) -> bool:
    """Whether an input is a camera, or by its extension a video."""
    return isinstance(source, int) or source.suffix.lower() in VIDEO


def find_inputs(text: str, output: Path, left_out: Collection[str] = ()) -> dict[Path | int, str]:
    """What an input names: images, videos, the index of a camera; each with the stem of its outputs.

    See `output_stems`.
    """
    if text.isdecimal() and not Path(text).exists():
        return {int(text): f"camera_{text}"}
    return {**output_stems(text, output, left_out)}


def output_stems(source: str | Path, output: Path, left_out: Collection[str] = ()) -> dict[Path, str]:
    """The images and videos of an input, each with the path inside the output folder that its files are named after.

    Subfolders are kept, and the extension is dropped unless another file of the folder has the same name without it,
    so no two share a name. Files inside `output` (of an earlier prediction) and in `left_out` (absolute paths) are not
    taken.
    """
    source = Path(source)
    if source.is_file() and source.suffix.lower() != ".txt":
        return {source: source.stem}
    inside = output.resolve()
    absolute = {os.path.abspath(path): path for path in _listed(source)}  # a list may name a file twice
    images = {
        name: path
        for name, path in absolute.items()
        if inside not in path.resolve().parents and name not in left_out
    }
    if not images:
        raise UserError(
            f"{source} holds no image and no video outside the output folder {output} that is not itself a prediction:"
            " choose another output folder, or other images"
        )
    folders = [os.path.dirname(name) for name in images]
    root = os.path.abspath(source) if source.is_dir() else os.path.commonpath(folders)
    names = [Path(os.path.relpath(name, root)) for name in images]
    stems = Counter(name.with_suffix("") for name in names)
    chosen = [name.with_suffix("") if stems[name.with_suffix("")] == 1 else name for name in names]
    if len(set(chosen)) < len(chosen):  # a.jpg and a.png beside a.jpg.png
        chosen = names
    return {path: name.as_posix() for path, name in zip(images.values(), chosen, strict=True)}


def _listed(source: Path) -> list[Path]:
    """The files of a folder, list or pattern, or one file; UserError if there are none."""
    if not source.exists() and re.search(r"[*?\[]", str(source)):
        fitting = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
        found = [path for path in fitting if path.suffix.lower() in (*IMAGE, *VIDEO) and path.is_file()]
        if not found:
            raise UserError(f"no image and no video fits {source}: check the pattern, and put it in quotes")
        return found
    if not source.exists():
        raise UserError(
            f"there is no image, video, folder or list at {source.absolute()}: check the path (a relative one starts at"
            " the current folder)"
        )
    videos: list[Path] = []
    if source.is_dir():
        files = (Path(folder, name) for folder, names in walk(source) for name in names)
        videos = sorted(path for path in files if is_video(path))
    try:
        return [*list_images(source), *videos]
    except ValueError:
        if not videos:
            raise
        return videos


def earlier_outputs(source: str | Path, output: Path) -> dict[Path, set[str]]:
    """The pictures and videos in a folder that earlier predictions wrote there, by their predictions.json.

    Args:
        source: what is to be predicted; only folders are searched.
        output: left out, for its content is no input anyway.

    Returns:
        absolute paths, of each predictions.json that names some.
    """
    found: dict[Path, set[str]] = {}
    if not Path(source).is_dir():
        return found
    inside = output.resolve()
    for folder, names in walk(Path(source)):
        record = Path(folder, RECORD)
        if RECORD not in names or inside in record.resolve().parents:
            continue
        try:
            report = json.loads(record.read_text(encoding="utf-8"))
            stems = [f"{folder}/{entry['output']}" for entry in report["predicted"]]
            videos = [f"{folder}/{entry['output']}" for entry in report["videos"]]
        except (OSError, ValueError, LookupError, TypeError):  # of another program
            continue
        for video in videos:
            frames = {path.stem.rpartition("_")[0] for path in Path(f"{video}_frames").glob("*.png")}
            stems += [f"{video}_frames/{frame}" for frame in frames]
        possible = {f"{stem}_{end}.png" for stem in stems for end in PICTURES}
        kinds = (".mp4", ".avi")  # the second of older versions
        possible |= {f"{stem}_{end}{kind}" for stem in videos for end in VIDEO_FORMATS for kind in kinds}
        if wrote := {os.path.abspath(path) for path in possible if os.path.isfile(path)}:
            found[record] = wrote
    return found
