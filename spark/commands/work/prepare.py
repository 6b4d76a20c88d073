"""What spark-prepare does, once its options are read."""

import io
import json
import os
import signal
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from spark.errors import UserError
from spark.files import write_whole
from spark.images.bands import Bands, open_image
from spark.images.decode import Picture, describe_failure
from spark.images.sources import Source, open_source
from spark.options import PrepareConfig
from spark.training.log import progress_bar
from spark.training.stop import ignore_stop_signals

NOTES = ".prepare"  # folder in the output: the settings, a note for each finished shard, fetched shards


SETTINGS = ("short_side", "min_side", "quality", "shard_size", "max_pixels", "in_chans")
"""Options that decide the content of the shards."""


def prepare(options: PrepareConfig) -> dict[str, Any]:
    """Write the shards that are missing, then the report, which is returned.

    Raises:
        UserError: the output folder holds something else; the source is wrong; no image was left.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after the shards under way.
    """
    output = Path(options.output)
    check_output(output)
    source, missing_shards = open_source(options.input, output / NOTES / "fetched", options.max_unreadable)
    settings = {"images": len(source), "digest": source.digest()}
    settings |= {name: getattr(options, name) for name in SETTINGS}
    keep_settings(output, settings)
    for leftover in output.glob(".*.part"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)

    shards = -(-len(source) // options.shard_size)
    missing = [shard for shard in range(shards) if not note_of(output, shard).exists()]
    workers = options.workers or os.cpu_count() or 1
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            ProcessPoolExecutor(min(workers, max(len(missing), 1)), initializer=begin_worker) as pool,
            progress_bar(shards, shards - len(missing)) as bar,
        ):
            tasks = [pool.submit(write_shard, source, options, output, shard) for shard in missing]
            try:
                for done, task in enumerate(as_completed(tasks), start=shards - len(missing) + 1):
                    task.result()
                    bar.update(done)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those under way are finished
                raise
    finally:
        signal.signal(signal.SIGTERM, previous)

    report = make_report(
        options.input, settings, missing_shards, [read_json(note_of(output, n)) for n in range(shards)]
    )
    write_whole(
        output / "report.json", (json.dumps(report, indent=1) + "\n").encode(errors="surrogateescape")
    )
    print(summary(report, output))
    if not report["written"]:
        raise UserError(f"no image of {options.input} was left: {output / 'report.json'} says why")
    return report


def begin_worker() -> None:
    """Leave signals to the main process, and end soon after it does.

    Without that, workers of a process that was killed wait for tasks for ever, or write beside those of the next run.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    ignore_stop_signals(0)
    threading.Thread(target=watch, daemon=True).start()


def check_output(output: Path) -> None:
    """Refuse a file, and a folder in which something else would be mixed with shards."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    if output.exists() and not (output / NOTES).exists() and any(output.iterdir()):
        raise UserError(f"--output {output} holds other files already: name a new or empty folder")


def keep_settings(output: Path, now: dict[str, Any]) -> None:
    """Record the settings of the shards, or refuse others than before."""
    path = output / NOTES / "settings.json"
    if path.exists():
        before = read_json(path)
        changes = [
            f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]
        ]
        if changes:
            raise UserError(
                f"the shards in {output} were made otherwise ({'; '.join(changes)}): give the command as it was, or "
                "another --output"
            )
    else:
        write_whole(path, json.dumps(now).encode())


def note_of(output: Path, shard: int) -> Path:
    """The file that marks a shard as finished, with the images left out."""
    return output / NOTES / f"{shard:06}.json"


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file of this tool; UserError if it is no JSON."""
    try:
        return json.loads(path.read_bytes().decode(errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and the same command writes it again"
        ) from error


def write_shard(source: Source, options: PrepareConfig, output: Path, shard: int) -> None:
    """Write one shard, under a hidden name until it is whole, then the note that it is finished.

    An image is called after its number in the source. A shard of which nothing is left is not written.
    """
    path = output / f"{shard:06}.tar"
    part = output / f".{path.name}.{os.getpid()}.part"
    dropped: list[list[str]] = []
    written = 0
    try:
        with tarfile.open(part, "w") as archive:
            first = shard * options.shard_size
            for index in range(first, min(first + options.shard_size, len(source))):
                name = source.name(index)
                try:
                    picture = open_image(source.read(index), options.in_chans, options.max_pixels)
                    small, extension = make_smaller(picture, options)
                except Exception as error:  # on corrupt bytes Pillow's readers raise nearly everything
                    dropped.append([name, describe_failure("", error).removeprefix(": ")])
                    continue
                entry = tarfile.TarInfo(f"{index:09}{extension}")
                entry.size = len(small)
                archive.addfile(entry, io.BytesIO(small))
                written += 1
        size = part.stat().st_size if written else 0
        if written:
            os.replace(part, path)
        else:
            part.unlink()
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    note = {"written": written, "bytes": size, "dropped": dropped}
    write_whole(note_of(output, shard), json.dumps(note).encode(errors="surrogateescape"))


def make_smaller(picture: Picture, options: PrepareConfig) -> tuple[bytes, str]:
    """A picture as a file and its extension; its short side is at most `short_side`, and never made larger.

    UserError or UnreadableImageError for a picture that is left out.
    """
    height, width = picture.height, picture.width
    short = min(height, width)
    if short < options.min_side:
        raise UserError(f"a side is shorter than {options.min_side} pixels")
    share = min(options.short_side / short, 1.0)
    size = max(round(width * share), 1), max(round(height * share), 1)
    if isinstance(picture, Bands):
        file = io.BytesIO()
        np.save(file, resized_bands(picture.pixels(), size))
        return file.getvalue(), ".image.npy"
    # From at least twice the size, where a reduced scale of the decoder looks like the full one.
    pixels = picture.pixels(next((n for n in (8, 4, 2) if short >= 2 * n * options.short_side), 1))
    if share < 1:
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), options.quality, "RGB", "420"), ".jpg"


def resized_bands(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Channels [H, W, C] at a size (width, height), bicubic each by itself, of the type that they have."""
    kind = values.dtype.newbyteorder("=")
    if not np.isfinite(values).all():
        raise UserError("it holds numbers that are not finite")
    if size == values.shape[1::-1]:
        return np.ascontiguousarray(values, kind)
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(values, -1, 0)]
    small = np.stack([np.asarray(one.resize(size, Image.Resampling.BICUBIC)) for one in channels], axis=-1)
    if np.issubdtype(kind, np.integer):
        small = small.round().clip(0, np.iinfo(kind).max)
    return small.astype(kind)


def make_report(
    source: str, settings: dict[str, Any], missing_shards: Sequence[str], notes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What was written, what was left out, and why."""
    dropped = [entry for note in notes for entry in note["dropped"]]
    return {
        "input": source,
        **settings,
        "written": sum(note["written"] for note in notes),
        "bytes": sum(note["bytes"] for note in notes),
        "shards": sum(note["written"] > 0 for note in notes),
        "lost_shards": list(missing_shards),
        "dropped": len(dropped),
        "reasons": dict(Counter(reason for _, reason in dropped).most_common()),
        "dropped_images": [{"name": name, "reason": reason} for name, reason in dropped],
    }


def summary(report: dict[str, Any], output: Path) -> str:
    """The report in a few lines."""
    shards = "shard" if report["shards"] == 1 else "shards"
    lines = [
        f"{report['written']} of {report['images']} images in {report['shards']} {shards} in {output}, "
        f"{report['bytes'] / 1e6:.1f} MB; {report['dropped']} left out"
    ]
    lines += [f"  {count} x {reason}" for reason, count in list(report["reasons"].items())[:10]]
    lines += [f"  shard not fetched: {line}" for line in report["lost_shards"]]
    return "\n".join(lines)
