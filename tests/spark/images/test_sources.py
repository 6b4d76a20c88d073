"""spark.images.sources: names, tar shards on the disk and behind a server, arrays, Hugging Face data sets."""

import io
import os
import pickle
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from spark.errors import FileError
from spark.images.batches import collate_images
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.sources import open_source, remote
from spark.images.sources.names import Names
from spark.images.transform import PretrainTransform
from spark.training.sampling import StreamSampler


def png(number: int) -> bytes:
    """An image that is all of one colour, which tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 2 * number, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, entries: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of five images each, 0..14, with labels beside them."""
    for shard in range(3):
        entries = {}
        for number in range(5 * shard, 5 * shard + 5):
            entries |= {f"{number:03}.png": png(number), f"{number:03}.json": b"{}"}
        write_shard(tmp_path / "shards" / f"{shard:02}.tar", entries)
    return tmp_path / "shards"


def opened(text, cache="unused", **options):
    source, lost = open_source(str(text), cache, **options)
    assert lost == []
    return source


def numbers(source) -> list[int]:
    """Of the images, as `png` made them."""
    return [Image.open(io.BytesIO(source.read(index))).getpixel((0, 0))[0] for index in range(len(source))]


# ------------------------------------------------------------------------------------------------------------ names


def test_names_are_kept_as_they_are():
    given = ["a.png", "", "ä b.jpg", os.fsdecode(b"caf\xe9.png"), "x" * 300]
    names = Names(given)
    assert list(names) == given
    with pytest.raises(IndexError):
        names[5]
    assert Names(iter(given)).digest() == names.digest() != Names(given[::-1]).digest()


def test_memory_of_names_is_their_length():
    count = 200_000
    names = Names(f"train/class{number % 1000:04}/{number:08}.jpg" for number in range(count))
    length = len("train/class0000/00000000.jpg")
    # 8 bytes a name beside the name, and nothing that grows with the number of Python objects.
    assert len(pickle.dumps(names)) < count * (length + 8) + 2000
    assert {type(value).__name__ for value in vars(names).values()} == {"ndarray"}
    assert pickle.loads(pickle.dumps(names))[123_456] == "train/class0456/00123456.jpg"


# ------------------------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("form", ["", "/{00..02}.tar", "/*.tar", "/0?.tar"])
def test_every_form_names_the_same_shards(shards, form):
    source = opened(f"{shards}{form}")
    assert numbers(source) == list(range(15))
    assert source.name(7) == f"{shards}/01.tar/007.png"
    assert source.digest() == opened(shards / "*.tar").digest() != opened(shards / "01.tar").digest()
    assert len(opened(shards / "01.tar")) == 5


def test_samples_of_shards_do_not_depend_on_workers_or_on_where_they_start(shards):
    images = UnlabeledImages(opened(shards), SampleReader(PretrainTransform(32), seed=3))

    def run(start, workers):
        stream = StreamSampler(15, 4, seed=3, start=start, stop=8)
        loader = DataLoader(images, batch_sampler=stream, num_workers=workers, collate_fn=collate_images)
        return [(batch["name"], batch["image"]) for batch in loader]

    whole = run(0, 0)
    assert len({name for names, _ in whole for name in names}) == 15
    for found in (run(3, 0), run(3, 2)):
        for (names, pixels), (expected_names, expected) in zip(found, whole[3:], strict=True):
            assert names == expected_names
            assert torch.equal(pixels, expected)


def test_pickled_source_still_reads(shards):
    assert numbers(pickle.loads(pickle.dumps(opened(shards)))) == list(range(15))


def test_only_plain_image_entries_are_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, link in [("link.png", str(secret)), ("hard.png", "in.png"), ("up.png", "../secret.png")]:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.LNKTYPE if name == "hard.png" else tarfile.SYMTYPE
            entry.linkname = link
            archive.addfile(entry)
        for name in ["../../outside.png", "/absolute.png", "in.PNG", ".hidden.png", "a.txt"]:
            entry = tarfile.TarInfo(name)
            entry.size = len(png(7))
            archive.addfile(entry, io.BytesIO(png(7)))
    before = sorted(tmp_path.parent.rglob("*"))
    source = opened(tmp_path / "a.tar")
    assert numbers(source) == [7, 7, 7]  # of the archive itself, whatever their names would mean elsewhere
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"", r"00\.tar is empty \(0 bytes\): write it again"),
        (lambda content: content[: 512 + 40], r"00\.tar is cut off"),
        (lambda content: content[: 1024 + 100], r"00\.tar is cut off"),
        (lambda content: content[: 4 * 512], r"00\.tar is cut off before the mark that ends a tar file"),
        (lambda content: b"no tar at all" * 100, r"00\.tar is no tar file"),
        (lambda content: b"\x1f\x8b" + content, r"00\.tar is compressed, .*: unpack it to a plain \.tar"),
        (lambda content: bytes(10240), r"00\.tar holds no image: looked for entries that end in \.jpg"),
    ],
)
def test_damaged_shards_are_named(shards, spoil, message):
    shard = shards / "00.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(ValueError, match=message):
        opened(shards)


def test_a_shard_cut_off_after_it_was_opened(shards):
    source = opened(shards)
    (shards / "02.tar").write_bytes((shards / "02.tar").read_bytes()[:600])
    sample = UnlabeledImages(source, SampleReader(PretrainTransform(32), seed=0))[0, 14]
    assert sample["failed"] == [f"{shards}/02.tar/014.png: the shard became shorter while it was used"]
    assert sample["name"].endswith("000.png")


# --------------------------------------------------------------------------------------------------------- patterns


def test_pattern_of_images(tmp_path):
    for name in ("a/1.png", "a/b/2.png", "c/3.png", "c/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(int(Path(name).stem)))
    assert numbers(opened(tmp_path / "**" / "*.png")) == [1, 2, 3]
    assert numbers(opened(tmp_path / "{c,a}" / "*")) == [3, 1]
    (tmp_path / "odd [1]").mkdir()
    (tmp_path / "odd [1]" / "5.png").write_bytes(png(5))
    assert numbers(opened(tmp_path / "odd [1]")) == [5]  # a folder of this name exists
    with pytest.raises(FileError, match=r"nothing matches .*x\*\.png: check the path"):
        opened(tmp_path / "x*.png")
    with pytest.raises(ValueError, match="no image or tar shard among them"):
        opened(tmp_path / "c" / "*.txt")
    with pytest.raises(ValueError, match="are not balanced"):
        opened(tmp_path / "{a,c")
    write_shard(tmp_path / "c" / "s.tar", {"1.png": png(1)})
    with pytest.raises(ValueError, match="matches 1 tar shards and 1 images: name one kind only"):
        opened(tmp_path / "c" / "*")


# ----------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_array(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 256, (6, 40, 48, *channels), dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    source = opened(tmp_path / "a.npy")
    assert len(source) == 6
    assert source.name(4) == f"{tmp_path}/a.npy[4]"
    assert np.array_equal(source.read(4), values[4])
    assert len(pickle.dumps(source)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(5), values[5])
    whole = PretrainTransform((40, 48), crop_scale=(1, 1), hflip=0)
    found = UnlabeledImages(source, SampleReader(whole, seed=0))[0, 2]["image"]
    assert found.shape == (3, 40, 48)


def test_arrays_that_are_no_images(tmp_path):
    path = tmp_path / "a.npy"
    for values, message in [
        (np.zeros((2, 8, 8, 4, 1), np.uint8), r"holds uint8 \[2, 8, 8, 4, 1\], not images"),
        (
            np.zeros((2, 8, 8), np.int64),
            r"holds int64 \[2, 8, 8\], not images: they are uint8, uint16, float32",
        ),
        (np.zeros((0, 8, 8), np.uint8), r"cut off|holds no image"),
        (np.array([{}], dtype=object), "no NumPy array that can be read piece by piece"),
    ]:
        np.save(path, values, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            opened(path)
    np.save(path, np.zeros((20, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"a\.npy is cut off"):
        opened(path)


# ----------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def hub(tmp_path) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = {
        "photo": [{"bytes": png(n), "path": None} for n in range(4)] + [None],
        "label": list(range(5)),
        "name": [f"{n}.png" for n in range(5)],
    }
    features = datasets.Features(
        photo=datasets.Image(), label=datasets.Value("int64"), name=datasets.Value("string")
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "hub")
    return tmp_path / "hub"


def test_hugging_face_data_set(hub):
    source = opened(f"hf:{hub}")
    assert [Image.open(io.BytesIO(source.read(n))).getpixel((0, 0))[0] for n in range(4)] == [0, 1, 2, 3]
    assert source.name(2) == f"hf:{hub}:train:photo[2]"
    sample = UnlabeledImages(opened(f"hf:{hub}:train:photo"), SampleReader(PretrainTransform(32), seed=0))[
        0, 4
    ]
    assert sample["failed"] == [f"hf:{hub}:train:photo[4]: no image in this row"]
    assert sample["index"] == 0


def test_hugging_face_data_sets_that_do_not_fit(hub, monkeypatch):
    with pytest.raises(
        ValueError, match=r"the column label of .* holds no images: it has photo \(Image\), label"
    ):
        opened(f"hf:{hub}:train:label")
    with pytest.raises(ValueError, match=r"has no column picture: it has photo \(Image\), label \(Value\)"):
        opened(f"hf:{hub}:train:picture")
    with pytest.raises(ValueError, match=r"hf:a:b:c:d is not of the form hf:NAME, hf:NAME:SPLIT"):
        opened("hf:a:b:c:d")
    (hub.parent / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"split train of the Hugging Face data set .*cannot be opened"):
        opened(f"hf:{hub.parent}/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"need the package datasets: pip install 'spark-pretrain\[hub\]'"):
        opened(f"hf:{hub}")


# ----------------------------------------------------------------------------------------------------------- remote


class ShardServer(BaseHTTPRequestHandler):
    """Serves a folder; a connection ends after `limits[name].pop(0)` bytes as long as there are such."""

    protocol_version = "HTTP/1.1"
    folder: Path
    limits: dict[str, list[int]]
    ranges: bool
    log: list[tuple[str, str | None]]

    def do_GET(self):
        name, asked = self.path.lstrip("/"), self.headers.get("Range")
        self.log.append((name, asked))
        path = self.folder / name
        if not path.exists():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        if asked and self.ranges:
            content, status = content[int(asked.removeprefix("bytes=").rstrip("-")) :], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        limits = self.limits.get(name)
        self.wfile.write(content[: limits.pop(0)] if limits else content)
        self.close_connection = True

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    """The handler's class and the address of a server of `shards` on this machine."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    state = {"folder": shards, "limits": {}, "ranges": True, "log": []}
    handler = type("Handler", (ShardServer,), state)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_shards_of_a_server(server, tmp_path):
    handler, address = server
    source = opened(f"{address}/{{00..02}}.tar", tmp_path / "cache")
    assert numbers(source) == list(range(15))
    assert len(handler.log) == 3
    assert opened(f"{address}/{{00..02}}.tar", tmp_path / "cache").digest() == source.digest()
    assert len(handler.log) == 3  # they are here now


def test_processes_that_fetch_together_share_the_work(server, tmp_path):
    handler, address = server
    urls = [f"{address}/0{shard}.tar" for shard in range(3)]
    with ThreadPoolExecutor(4) as several:
        found = list(several.map(lambda _: remote.fetch_shards(urls, tmp_path / "cache"), range(4)))
    assert all(result == found[0] for result in found)
    assert len(handler.log) == 3


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_is_taken_up_again(server, tmp_path, ranges):
    handler, address = server
    handler.limits["01.tar"] = [3000, 700]
    handler.ranges = ranges
    assert numbers(opened(f"{address}/{{00..02}}.tar", tmp_path / "cache")) == list(range(15))
    asked = [bytes_ for name, bytes_ in handler.log if name == "01.tar"]
    assert asked == [None, "bytes=3000-", "bytes=3700-" if ranges else "bytes=3000-"]


def test_a_shard_that_cannot_be_fetched_is_left_out_or_ends_the_run(server, tmp_path):
    handler, address = server
    handler.limits["01.tar"] = [100] * 100
    text, cache = f"{address}/{{00..02}}.tar", tmp_path / "cache"
    with pytest.raises(ValueError, match=r"1 of 3 shards could not be fetched, .* data\.max_unreadable") as e:
        open_source(text, cache)
    assert "01.tar: the connection broke off (after 500 of 20480 bytes), 5 times in a row" in str(e.value)
    assert {path.name.split("-")[-1] for path in cache.glob("*.tar")} == {"00.tar", "02.tar"}
    assert not list(cache.glob(".*.part"))

    source, lost = open_source(text, cache, max_unreadable=0.01)
    assert numbers(source) == [*range(5), *range(10, 15)]
    assert len(lost) == 1
    assert lost[0].startswith(f"{address}/01.tar: the connection broke off")
    handler.limits.clear()
    assert numbers(opened(text, cache)) == list(range(15))


def test_missing_and_damaged_shards_of_a_server(server, shards, tmp_path):
    handler, address = server
    (shards / "00.tar").write_bytes((shards / "00.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"2 of 2 shards .*00\.tar is cut off.*; .*the server answers 404"):
        open_source(f"{address}/{{00,07}}.tar", tmp_path / "cache", max_unreadable=1.0)
    assert [name for name, _ in handler.log].count("07.tar") == 1  # what is not there is asked for once
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_no_address_leads_out_of_the_cache():
    for url in ("http://h/../../x.tar", "http://h/a/..", "http://h/", "http://h/a%2fb.tar?x=/../y"):
        name = remote.local_name(url)
        assert "/" not in name
        assert name not in {".", ".."}
    assert remote.local_name("http://a/0.tar") != remote.local_name("http://b/0.tar")
