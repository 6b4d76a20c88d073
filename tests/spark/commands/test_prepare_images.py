"""spark/commands/prepare.py: shards of smaller images, the report, stopping and going on, refusals."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.nn import functional

from spark.commands import prepare as prepare_images
from spark.commands.work import prepare as work
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.sources import open_source, open_stream
from spark.images.transform import PretrainTransform
from spark.options import PrepareConfig

ROOT = Path(__file__).resolve().parents[3]


def photo(path: Path, height=300, width=400, **options) -> Path:
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    pixels = np.stack([rows, columns, np.full_like(rows, 90)], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven images: large, small, turned, with 16 bits; of them 3 is broken and 5 no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photo(folder / "0.jpg")
    photo(folder / "1.png", 40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(folder / "2.jpg", exif=exif)
    (folder / "3.jpg").write_bytes(photo(folder / "3.jpg").read_bytes()[:900])
    Image.fromarray(np.full((200, 100), 32896, np.uint16)).save(folder / "4.png")
    (folder / "5.jpg").write_text("no image")
    photo(folder / "6.jpg", 1300, 1000, quality=95)
    return folder


def run(photos, output, *more) -> dict:
    options = ["--short_side", "64", "--shard_size", "3", "--workers", "1", *more]
    prepare_images.main(["--input", str(photos), "--output", str(output), *options])
    return json.loads((output / "report.json").read_text())


def images_in(shard: Path) -> dict[str, Image.Image]:
    with tarfile.open(shard) as archive:
        entries = {}
        for entry in archive:
            file = archive.extractfile(entry)
            assert file is not None
            entries[entry.name] = Image.open(io.BytesIO(file.read()))
    return entries


def test_shards_and_report(photos, tmp_path, capsys):
    report = run(photos, tmp_path / "out")
    found = [images_in(tmp_path / "out" / f"00000{shard}.tar") for shard in range(3)]
    assert {name: image.size for shard in found for name, image in shard.items()} == {
        "000000000.jpg": (85, 64),
        "000000001.jpg": (30, 40),  # never made larger
        "000000002.jpg": (64, 85),  # upright
        "000000004.jpg": (64, 128),
        "000000006.jpg": (64, 83),
    }
    assert {image.format for shard in found for image in shard.values()} == {"JPEG"}
    large = np.asarray(found[2]["000000006.jpg"].convert("RGB")).astype(float)
    rows, columns = np.meshgrid(np.linspace(0, 255, 83), np.linspace(0, 255, 64), indexing="ij")
    assert np.abs(large[..., 0] - rows).mean() < 4
    assert np.abs(large[..., 1] - columns).mean() < 4
    assert np.abs(np.asarray(found[1]["000000004.jpg"]).astype(int) - 128).max() <= 2

    assert (report["images"], report["written"], report["dropped"], report["shards"]) == (7, 5, 2, 3)
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in report["dropped_images"]}
    assert "truncated" in reasons["3.jpg"]
    assert reasons["5.jpg"] == "not an image of a known kind, or its header is damaged"
    assert sum(report["reasons"].values()) == 2
    assert "5 of 7 images in 3 shards" in capsys.readouterr().out

    source, _ = open_source(str(tmp_path / "out"), "unused")
    assert len(source) == 5
    assert source.name(4).endswith("000002.tar/000000006.jpg")


def test_finished_shards_are_kept_and_missing_ones_are_written(photos, tmp_path):
    output = tmp_path / "out"
    whole = run(photos, output)
    contents = {path.name: path.read_bytes() for path in output.glob("*.tar")}
    (output / "000001.tar").unlink()
    work.note_of(output, 1).unlink()
    (output / "report.json").unlink()
    (output / "000000.tar").write_bytes(b"untouched")
    assert run(photos, output) == whole
    assert (output / "000000.tar").read_bytes() == b"untouched"
    assert (output / "000001.tar").read_bytes() == contents["000001.tar"]


def test_a_shard_that_fails_leaves_nothing(photos, tmp_path, monkeypatch):
    source, _ = open_source(str(photos), "unused")
    (tmp_path / "out").mkdir()
    options = PrepareConfig(input=str(photos), output=str(tmp_path / "out"), short_side=64, shard_size=7)
    monkeypatch.setattr(
        os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        work.write_shard(source, options, tmp_path / "out", 0)
    assert list((tmp_path / "out").iterdir()) == []


def test_workers_and_small_images(photos, tmp_path):
    report = run(photos, tmp_path / "out", "--workers", "2", "--min_side", "50")
    assert report["reasons"]["a side is shorter than 50 pixels"] == 1
    assert report["written"] == 4


def test_a_terminated_run_goes_on(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        photo(folder / f"{number:02}.png", 700, 700)
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "spark" / "commands" / "prepare.py"), "--input", str(folder)]
    command += ["--output", str(output), "--shard_size", "2", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not list(output.glob("*.tar")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    done = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert 1 <= len(done) < 20
    assert not list(output.glob(".*.part"))
    assert len(open_source(str(output), "unused")[0]) == 2 * len(done)  # all of them whole

    prepare_images.main(command[2:])
    assert len(open_source(str(output), "unused")[0]) == 40
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_nothing_of_a_killed_run_goes_on_or_stays(tmp_path):
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number in range(40):
        photo(folder / f"{number:02}.png", 700, 700)
    command = [sys.executable, str(ROOT / "spark" / "commands" / "prepare.py"), "--input", str(folder)]
    command += ["--output", str(output), "--shard_size", "2", "--workers", "2"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        until = time.monotonic() + 240
        while not list(output.glob("*.tar")) and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=120)  # ends when the last worker has closed the pipe
    assert 1 <= len(list(output.glob("*.tar"))) < 20
    (output / ".000019.tar.77.part").write_bytes(b"half")
    prepare_images.main(command[2:])
    assert len(open_source(str(output), "unused")[0]) == 40
    assert not list(output.glob(".*.part"))


# ----------------------------------------------------------------------------------------------- other than photographs


def bands(kind, number, height=90, width=120, channels=5) -> np.ndarray:
    """Smooth waves and noise, each channel its own, over the whole range of the type."""
    random = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 9 + c) + np.cos(columns / 7 + 2 * c + number) for c in range(channels)]
    values = (np.stack(waves, -1) + 2) / 4 + random.normal(0, 0.02, (height, width, channels))
    if kind == np.float32:
        return (1000 * values - 300).astype(kind)
    return (values.clip(0, 1) * np.iinfo(kind).max).round().astype(kind)


def samples(path: Path, channels: int) -> list:
    transform = PretrainTransform(32, channels, (0.5, 1), (0.5,) * channels, (0.5,) * channels)
    images = UnlabeledImages(
        open_source(str(path), "unused")[0], SampleReader(transform, seed=0, channels=channels)
    )
    return [images[position, position] for position in range(len(images))]


@pytest.mark.parametrize(
    ("kind", "channels"),
    [(np.uint8, 5), (np.uint16, 5), (np.float32, 5), (np.uint16, 1), (np.float32, 3)],
)
def test_arrays_keep_channels_and_type(kind, channels, tmp_path, capsys):
    """Samples of the shards are those of a folder of arrays that PyTorch made smaller, in double precision."""
    whole, small = tmp_path / "whole", tmp_path / "small"
    whole.mkdir(), small.mkdir()
    for number in range(4):
        values = bands(kind, number, channels=channels)
        if number == 3:
            values = values[:40, :50]  # small already
        stored = values.astype(values.dtype.newbyteorder(">")) if number == 1 else values
        if channels == 5 and number < 2:
            tifffile.imwrite(whole / f"{number}.tif", values.transpose(2, 0, 1), photometric="minisblack")
        else:
            np.save(whole / f"{number}.npy", stored)
        exact = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)[None]
        if number < 3:
            exact = functional.interpolate(exact, (60, 80), mode="bicubic", antialias=True)
        exact = exact[0].permute(1, 2, 0).numpy()
        if kind != np.float32:
            exact = exact.round().clip(0, np.iinfo(kind).max)
        np.save(small / f"{number}.npy", exact.astype(kind))
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(whole.iterdir(), key=lambda path: path.stem)))
    report = run(listed, tmp_path / "out", "--short_side", "60", "--in_chans", str(channels))
    assert (report["written"], report["dropped"], report["in_chans"]) == (4, 0, channels)

    stored = open_source(str(tmp_path / "out"), "unused")[0]
    assert stored.name(3).endswith("000001.tar/000000003.image.npy")
    for number in range(4):
        values = np.load(io.BytesIO(stored.read(number)), allow_pickle=False)
        assert (values.dtype, values.shape[2]) == (kind, channels)
    tolerance = {np.uint8: 1, np.uint16: 1 / 65535, np.float32: 2e-3}[kind]
    for found, wanted in zip(samples(tmp_path / "out", channels), samples(small, channels), strict=True):
        assert found["failed"] == []
        assert found["image"].dtype == (torch.uint8 if kind == np.uint8 else torch.float32)
        difference = found["image"].double() - wanted["image"].double()
        assert difference.abs().max() <= (0 if found["index"] == 3 else 2 * tolerance)
    streamed = open_stream(str(tmp_path / "out"))
    names = [Path(entry.name).name for shard in range(2) for entry in streamed.entries(shard)]
    assert names == [f"00000000{number}.image.npy" for number in range(4)]


def test_what_other_channels_cannot_be_made_of(photos, tmp_path):
    np.save(tmp_path / "four.npy", bands(np.uint16, 0, channels=4))
    broken = bands(np.float32, 0)
    broken[3, 4, 2] = np.inf
    np.save(tmp_path / "broken.npy", broken)
    np.save(tmp_path / "right.npy", bands(np.float32, 1))
    names = ("four.npy", "broken.npy", "photos/0.jpg", "right.npy")
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    report = run(tmp_path / "list.txt", tmp_path / "out", "--in_chans", "5")
    assert [entry["reason"] for entry in report["dropped_images"]] == [
        "it has 4 channels (the last of [90, 120, 4]), and model.in_chans is 5",
        "it holds numbers that are not finite",
        "it is neither a NumPy file (.npy) nor TIFF, which images of model.in_chans 5 are read from",
    ]
    assert report["written"] == 1


def test_arrays_beside_photos_in_a_shard_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("0.jpg", "0.npy", "0.image.npy", ".1.image.npy"):
            archive.addfile(tarfile.TarInfo(name))
    source = open_source(str(tmp_path / "a.tar"), "unused")[0]
    assert [Path(source.name(number)).name for number in range(len(source))] == ["0.jpg", "0.image.npy"]


def test_refusals(photos, tmp_path, capsys):
    def refused(output, *more) -> str:
        with pytest.raises(SystemExit) as error:
            run(photos, output, *more)
        assert error.value.code == 2
        return capsys.readouterr().err

    assert "holds other files already: name a new or empty folder" in refused(photos)
    assert "is a file: name a folder" in refused(photos / "0.jpg")
    assert "quality must be a whole number from 1 to 100, got 0" in refused(
        tmp_path / "out", "--quality", "0"
    )
    assert not (tmp_path / "out").exists()
    run(photos, tmp_path / "out")
    capsys.readouterr()
    assert "were made otherwise (quality was 90, is 80): give the command as it was" in refused(
        tmp_path / "out", "--quality", "80"
    )
    photo(photos / "7.jpg")
    assert "images was 7, is 8" in refused(tmp_path / "out")
    assert "no image of" in refused(tmp_path / "none", "--min_side", "5000")
