"""Streaming: shards divided over readers, the shuffle buffer, exact places to resume at, connections that break off."""

import io
import os
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import DataLoader

from spark.errors import FileError
from spark.images.batches import MaskedBatches, StepPlan
from spark.images.dataset import SampleReader
from spark.images.sources import open_source, open_stream, remote
from spark.images.sources.base import ShardError
from spark.images.stream import Division, Reader, StreamedBatches
from spark.images.transform import PretrainTransform
from spark.training.skipped import UnreadableImages
from tests.spark.images.test_sources import png, server, shards, write_shard  # noqa: F401  (fixtures)
from tests.spark.test_pretrain import assert_equal, at_step, curve, error_of, run, small_run, spoiled, weights


def flat(lists):
    return [item for each in lists for item in each]


def number_of(entry) -> int:
    return Image.open(io.BytesIO(entry.read())).getpixel((0, 0))[0]


def many_shards(folder: Path, counts: list[int]) -> Path:
    """Shards of so many images each; the images of all of them are numbered on."""
    first = 0
    for shard, count in enumerate(counts):
        write_shard(folder / f"{shard:02}.tar", {f"{n:03}.png": png(n) for n in range(first, first + count)})
        first += count
    return folder


# ----------------------------------------------------------------------------------------------------------- shards


def test_a_shard_is_read_on_from_any_place(shards):  # noqa: F811
    stream = open_stream(str(shards))
    entries = list(stream.entries(1))
    assert [number_of(entry) for entry in entries] == [5, 6, 7, 8, 9]
    assert entries[2].name == f"{shards}/01.tar/007.png"
    for done, entry in enumerate(entries, start=1):
        assert [number_of(e) for e in stream.entries(1, entry.after)] == [5, 6, 7, 8, 9][done:]
    assert len(stream) == 3
    assert stream.size is None
    assert stream.digest() == open_stream(f"{shards}/{{00..02}}.tar").digest()


def test_long_names_and_links_in_a_streamed_shard(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind in [
            ("l" * 300 + ".png", tarfile.REGTYPE),
            ("x.png", tarfile.SYMTYPE),
            ("ü.png", b"0"),
        ]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            entry.size = len(png(3)) if kind != tarfile.SYMTYPE else 0
            archive.addfile(entry, io.BytesIO(png(3)))
    stream = open_stream(str(tmp_path / "a.tar"))
    entries = list(stream.entries(0))
    assert [os.path.basename(entry.name) for entry in entries] == ["l" * 300 + ".png", "ü.png"]
    assert [number_of(entry) for entry in stream.entries(0, entries[0].after)] == [3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"", r"00\.tar is empty \(0 bytes\): write it again"),
        (lambda content: content[: 512 + 40], r"00\.tar is cut off in 000\.png"),
        (lambda content: content[: 1024 + 100], r"00\.tar is cut off"),
        (lambda content: content[: 4 * 512], r"00\.tar is cut off before the mark that ends a tar file"),
        (lambda content: b"no tar at all" * 100, r"00\.tar is no tar file"),
        (lambda content: b"\n<!DOCTYPE html><p>Sign in" + bytes(900), r"00\.tar is a web page, no tar file"),
        (lambda content: b"\x1f\x8b" + content, r"00\.tar is compressed, .*: unpack it to a plain \.tar"),
        (lambda content: bytes(10240), r"00\.tar holds no image: looked for entries that end in \.jpg"),
    ],
)
def test_damaged_shards_are_named(shards, spoil, message):  # noqa: F811
    shard = shards / "00.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(ShardError, match=message):
        list(open_stream(str(shards)).entries(0))


def test_what_cannot_be_streamed(tmp_path, shards):  # noqa: F811
    (tmp_path / "photo.png").write_bytes(png(1))
    with pytest.raises(
        ValueError, match=r"no set of tar shards and no Hugging Face .* leave data\.streaming false"
    ):
        open_stream(str(tmp_path))
    with pytest.raises(FileError, match="there are no tar shards at"):
        open_stream(str(tmp_path / "none"))


# ------------------------------------------------------------------------------------------------------ connections


@pytest.mark.parametrize("ranges", [True, False])
def test_a_streamed_connection_that_breaks_off_is_taken_up_again(server, ranges):  # noqa: F811
    handler, address = server
    handler.limits["01.tar"] = [3000, 700 if ranges else 3700, 5000 if ranges else 8700]
    handler.ranges = ranges
    stream = open_stream(f"{address}/{{00..02}}.tar")
    entries = list(stream.entries(1))
    assert [number_of(entry) for entry in entries] == [5, 6, 7, 8, 9]
    assert [asked for _, asked in handler.log] == [None, "bytes=3000-", "bytes=3700-", "bytes=8700-"]
    assert [number_of(entry) for entry in stream.entries(1, entries[3].after)] == [9]
    assert handler.log[-1] == ("01.tar", f"bytes={entries[3].after}-")


def test_a_server_that_gives_up(server):  # noqa: F811
    handler, address = server
    handler.limits["01.tar"] = [3000] + [0] * 20
    stream = open_stream(f"{address}/{{00..03}}.tar")
    got = []
    with pytest.raises(
        ShardError, match=r"the connection broke off \(after 3000 of 20480 bytes\), 5 times in a row"
    ):
        got.extend(entry for entry in stream.entries(1))
    assert len(handler.log) == 5
    with pytest.raises(ShardError, match="the server answers 404 Not Found"):
        list(stream.entries(3))
    assert len(handler.log) == 6, "what is not there is asked for once"
    shorter = handler.folder / "02.tar"
    shorter.write_bytes(shorter.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"02\.tar is cut off"):
        list(stream.entries(2))
    handler.ranges = False
    with pytest.raises(ShardError, match="the server has 2000 bytes only, fewer than before"):
        list(stream.entries(2, 5000))


def test_a_shard_that_changes_while_it_is_read(server, tmp_path):  # noqa: F811
    """Its beginning and its end are not put together: the stream gives it up, and what is fetched begins anew."""
    handler, address = server
    shard = handler.folder / "01.tar"
    old = shard.read_bytes()
    write_shard(shard, {f"{n:03}.png": png(n) for n in range(20, 27)})
    new = shard.read_bytes()
    assert len(new) != len(old)

    class Changes(list):
        def pop(self, number):
            shard.write_bytes(new)
            return super().pop(number)

    for source in ("streamed", "fetched"):
        shard.write_bytes(old)
        handler.limits["01.tar"] = Changes([3000])
        if source == "streamed":
            with pytest.raises(ShardError, match=rf"it changed .* \({len(old)} bytes then, {len(new)} now\)"):
                list(open_stream(f"{address}/{{00..02}}.tar").entries(1))
        else:
            found, lost = open_source(f"{address}/01.tar", tmp_path / "cache")
            assert not lost
            assert [Image.open(io.BytesIO(found.read(n))).getpixel((0, 0))[0] for n in range(7)] == [
                *range(20, 27)
            ]


def test_attempts_begin_anew_after_a_megabyte(monkeypatch):
    content, calls = bytes(5 << 20), []

    class Answer(io.BytesIO):
        status = 206

    def urlopen(request, timeout):
        begin = int(request.headers.get("Range", "bytes=0-")[6:-1])
        calls.append(begin)
        answer = Answer(content[begin : begin + (2 << 20) if len(calls) % 2 else begin])
        answer.headers = {"Content-Length": str(len(content) - begin)}
        return answer

    monkeypatch.setattr(remote, "PAUSE", 0)
    monkeypatch.setattr(remote, "RETRIES", 2)
    monkeypatch.setattr(remote.urllib.request, "urlopen", urlopen)
    assert len(io.BufferedReader(remote.Download("http://h/a")).read()) == len(content)
    assert calls == [0, 2 << 20, 2 << 20, 4 << 20, 4 << 20]


# --------------------------------------------------------------------------------------------------------- division


@pytest.mark.parametrize(("shard_count", "readers"), [(7, 3), (6, 3), (3, 3), (9, 4)])
def test_every_pass_gives_each_shard_to_one_reader(shard_count, readers):
    division = Division(shard_count, readers, seed=5)
    orders = []
    totals = Counter()
    for number in range(2 * readers):
        shares = [division.share(reader, number) for reader in range(readers)]
        assert sorted(flat(shares)) == list(range(shard_count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        totals.update({reader: len(share) for reader, share in enumerate(shares)})
        orders.append(tuple(flat(shares)))
    assert len(set(totals.values())) == 1, "shares that differ take turns"
    assert shard_count < 4 or len(set(orders)) == len(orders), "each pass has an order of its own"
    assert Division(shard_count, readers, seed=6).share(0, 0) != division.share(0, 0) or shard_count == 3


def read(source, division, reader, count, state=None, buffer=4):
    one = Reader(
        source, division, reader, division.start()[reader].tolist() if state is None else state, buffer, 0
    )
    return [entry.name for entry in islice(iter(one), count)], one.state


def test_readers_together_read_every_image_once_a_pass_and_shuffle(tmp_path):
    source = open_stream(str(many_shards(tmp_path, [5, 3, 7, 1, 6])))
    division = Division(5, 2, seed=1)
    sizes = [5, 3, 7, 1, 6]
    names = []
    for reader in (0, 1):
        total = sum(sizes[shard] for shard in division.share(reader, 0))
        one = Reader(source, division, reader, division.start()[reader].tolist(), 1, 0)
        names.append([entry.name for entry in islice(iter(one), total)])
    assert sorted(flat(names)) == sorted(e.name for shard in range(5) for e in source.entries(shard))

    # A buffer reorders within its blocks and changes nothing else.
    plain, _ = read(source, division, 0, 40, buffer=1)
    shuffled, _ = read(source, division, 0, 40, buffer=8)
    assert plain != shuffled
    for block in range(0, 40, 8):
        assert sorted(plain[block : block + 8]) == sorted(shuffled[block : block + 8])


@pytest.mark.parametrize("buffer", [1, 4, 30])
def test_a_reader_goes_on_from_its_state(tmp_path, buffer):
    source = open_stream(str(many_shards(tmp_path, [5, 3, 7, 1, 6])))
    division = Division(5, 2, seed=1)
    whole, _ = read(source, division, 1, 60, buffer=buffer)
    for count in (1, 3, 4, 5, 29, 30, 31):
        first, state = read(source, division, 1, count, buffer=buffer)
        rest, _ = read(source, division, 1, 60 - count, state, buffer)
        assert first + rest == whole, count


def test_another_number_of_readers_goes_on_with_what_nobody_has_begun(tmp_path):
    sizes = [2, 3, 4, 2, 3, 1, 2, 4, 3, 2]
    source = open_stream(str(many_shards(tmp_path, sizes)))
    division = Division(10, 2, seed=3)
    read_before, states = [], []
    for reader, count in ((0, 4), (1, 7)):
        names, state = read(source, division, reader, count, buffer=2)
        read_before += names
        states.append(state)
    again = division.divide_again(torch.tensor(states), 3)
    left = set(again.left[0])
    begun = {int(name.split("/")[-2].removesuffix(".tar")) for name in read_before}
    assert not left & begun
    assert len(left) + len(begun) >= 9, "a buffer of 2 reaches at most one shard further"
    assert sorted(flat(again.share(reader, 0) for reader in range(3))) == sorted(left)
    assert sorted(flat(again.share(reader, 1) for reader in range(3))) == list(range(10))
    after = []
    for reader in range(3):
        total = sum(sizes[shard] for shard in again.share(reader, 0))
        after += read(source, again, reader, total, buffer=1)[0]
    assert len(set(read_before + after)) == len(read_before) + len(after), "no image twice in the pass"


def test_readers_in_different_passes_are_divided_again():
    division = Division(4, 2, seed=0)
    done = torch.tensor([[0, 0, 9, 1, 0, 0], [1, 0, 0, 3, 1, 0]])  # reader 1 has begun the next pass
    again = division.divide_again(done, 1)
    assert again.first == 0
    assert sorted(again.left[0]) == sorted(division.share(0, 0)[1:])
    assert sorted(again.left[1]) == sorted(division.share(0, 1) + division.share(1, 1)[1:])
    once_more = again.divide_again(again.start(), 2)
    assert once_more.left[0] == again.left[0], "nothing was read meanwhile"
    assert sorted(once_more.left[1]) == sorted(again.left[1]), "nor is what was read of pass 1 read again"


# ---------------------------------------------------------------------------------------------------------- batches


def batches(source, world=1, workers=0, rank=0, start=0, stop=12, states=None, batch=3, **options):
    """Of one process; all processes draw from one division."""
    own = max(workers, 1)
    division = Division(len(source), world * own, seed=2)
    plan = StepPlan(((32, 32),), 0.5, batch * world, seed=2)
    dataset = StreamedBatches(
        source,
        SampleReader(PretrainTransform(32), plan.seed, max_pixels=10**6, plan=plan),
        MaskedBatches(plan, 8),
        division,
        division.start()[rank * own :][:own] if states is None else states,
        batch_size=batch,
        rank=rank,
        world_size=world,
        start=start,
        stop=stop,
        **{"buffer": 4, **options},
    )
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


def test_two_processes_of_two_workers_share_a_pass_without_repeating(tmp_path):
    source = open_stream(str(many_shards(tmp_path, [6] * 8)))
    found = [batches(source, world=2, workers=2, rank=rank, stop=4) for rank in (0, 1)]
    names = [name for each in found for batch in each for name in batch["name"]]
    assert len(names) == 24
    assert len(set(names)) == 24
    positions = sorted(int(p) for each in found for batch in each for p in batch["position"])
    assert positions == list(range(24))
    assert [batch["reader"] for batch in found[0]] == [0, 1, 0, 1]
    whole = [batches(source, world=2, workers=2, rank=rank, stop=8) for rank in (0, 1)]
    every = Counter(name for each in whole for batch in each for name in batch["name"])
    assert len(every) == 48, "8 batches of 3 in 2 processes are a pass, read to its end"
    assert set(every.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_their_states(shards, workers):  # noqa: F811
    source = open_stream(str(shards))
    whole = batches(source, workers=workers)
    assert len(whole) == 12
    for done in (1, 5):
        own = max(workers, 1)
        states = Division(3, own, seed=2).start()
        for batch in whole[:done]:
            states[batch["reader"]] = batch["state"]
        rest = batches(source, workers=workers, start=done, states=states)
        for found, expected in zip(rest, whole[done:], strict=True):
            assert found["name"] == expected["name"]
            assert torch.equal(found["image"], expected["image"])
            assert torch.equal(found["visible"], expected["visible"])
            assert torch.equal(found["state"], expected["state"])


def test_no_loader_process_or_one_is_the_same(shards):  # noqa: F811
    source = open_stream(str(shards))
    assert [b["name"] for b in batches(source)] == [b["name"] for b in batches(source, workers=1)]


def test_broken_shards_are_counted_or_stop_by_policy(server):  # noqa: F811
    handler, address = server
    handler.limits["01.tar"] = [4000] + [0] * 100
    source = open_stream(f"{address}/{{00..03}}.tar")  # 03.tar is not there
    with pytest.raises(ValueError, match=r"1 of 4 shards could not be read to their end, .*0[13]\.tar: the "):
        batches(source, stop=8)
    found = batches(source, stop=8, max_failures=2)
    lost = [line for batch in found for line in batch["failed_shards"]]
    assert {line.split(": ")[0] for line in lost} == {f"{address}/01.tar", f"{address}/03.tar"}
    assert all(line.count(": ") == 1 for line in lost)
    assert len(set(flat(batch["name"] for batch in found))) >= 10

    unreadable = UnreadableImages(100, 0.5, num_shards=4)
    assert len(unreadable.add_shards(lost)) == 2
    assert unreadable.add_shards(lost) == []
    with pytest.raises(
        ValueError, match=r"3 of 4 shards could not be read to their end, .* raise data\.max_unreadable"
    ):
        unreadable.add_shards(["http://h/9.tar: gone"])


def test_unreadable_images_are_told_and_the_next_takes_the_place(tmp_path):
    entries = {f"{n}.png": png(n) for n in range(4)} | {"4.png": b"no image"}
    write_shard(tmp_path / "a.tar", entries)
    found = batches(open_stream(str(tmp_path / "a.tar")), stop=4)
    assert [len(batch["name"]) for batch in found] == [3] * 4
    failed = [line for batch in found for line in batch["failed"]]
    assert failed[0] == f"{tmp_path}/a.tar/4.png: not an image of a known kind, or its header is damaged"
    write_shard(tmp_path / "b.tar", {"4.png": b"no image"})
    with pytest.raises(ValueError, match="images were tried one after another and none could be read"):
        batches(open_stream(str(tmp_path / "b.tar")), stop=4)


def test_memory_is_that_of_the_buffer(tmp_path):
    """However much was read: blocks are let go image by image."""
    noise = np.random.default_rng(0).bytes(20_000)
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.tar", {f"{n}.png": noise for n in range(40)})
    source = open_stream(str(tmp_path))
    division = Division(3, 1, seed=0)
    tracemalloc.start()
    peaks = []
    for count in (50, 500):
        tracemalloc.reset_peak()
        for _ in islice(iter(Reader(source, division, 0, division.start()[0].tolist(), 10, 0)), count):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 20 * 20_000, "a block of 10 images of 20 kB, and what is under way"


# ----------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def parquet(tmp_path) -> Path:
    """A data set of three parquet files of four rows, one without an image."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(photo=datasets.Image(), label=datasets.Value("int64"))
    for part in range(3):
        cells = [{"bytes": png(4 * part + n), "path": None} if part or n else None for n in range(4)]
        rows = datasets.Dataset.from_dict({"photo": cells, "label": range(4)}, features=features)
        rows.to_parquet(str(tmp_path / "set" / f"train-{part}.parquet"))
    return tmp_path / "set"


def test_hugging_face_stream(parquet):
    stream = open_stream(f"hf:{parquet}")
    assert len(stream) == 3
    entries = list(stream.entries(2))
    assert [number_of(entry) for entry in entries] == [8, 9, 10, 11]
    assert [number_of(entry) for entry in stream.entries(2, entries[1].after)] == [10, 11]
    assert entries[1].name == f"hf:{parquet}:train:photo[shard 2, row 1]"
    with pytest.raises(ValueError, match="no image in this row"):
        next(iter(stream.entries(0))).read()
    found = batches(stream, workers=2, stop=8)
    names = Counter(name for batch in found for name in batch["name"])
    assert len(names) == 11
    assert sum(len(batch["failed"]) for batch in found) >= 1
    assert open_stream(f"hf:{parquet}", 12).size == 12


def test_hugging_face_streams_that_do_not_fit(parquet):
    with pytest.raises(
        ValueError, match=r"the column label of .* holds no images: it has photo \(Image\), label"
    ):
        open_stream(f"hf:{parquet}:train:label")
    with pytest.raises(ValueError, match=r"split test of the Hugging Face data set .* cannot be opened"):
        open_stream(f"hf:{parquet}:test")
    (parquet / "train-1.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ShardError, match=r"cannot be read from row 0 on \(\w+, "):
        list(open_stream(f"hf:{parquet}").entries(1))


def test_a_saved_data_set_is_not_streamed(parquet, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"any order already: leave data\.streaming false"):
        open_stream(f"hf:{tmp_path / 'saved'}")
    assert len(open_source(f"hf:{parquet}", "unused")[0]) == 12


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def photos_in_shards(tmp_path) -> Path:
    """Four shards of 3, 4, 3, and 2 images."""
    random = np.random.default_rng(0)
    for shard, count in enumerate((3, 4, 3, 2)):
        entries = {}
        for number in range(count):
            tiles = random.integers(0, 256, (5, 6, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(tiles).save(buffer, "PNG")
            entries[f"{number}.png"] = buffer.getvalue()
        write_shard(tmp_path / "shards" / f"{shard:02}.tar", entries)
    return tmp_path / "shards"


STREAMED = (
    "--data.streaming=true",
    "--data.shuffle_buffer=4",
    "--data.size=12",
    "--optim.batch_size=4",
    "--optim.warmup_steps=1",
)


def streamed(source, folder, *more):
    return small_run(source, folder, *STREAMED, *more)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_resumes_exactly(photos_in_shards, tmp_path, capsys, workers):
    options = ("--accumulation=2", "--checkpoint_every=1", "--keep_checkpoints=9", "--max_steps=7")
    options += (f"--data.workers={workers}", "--data.max_unreadable=0")
    run(streamed(photos_in_shards, tmp_path / "whole", *options))
    out = " ".join(capsys.readouterr().out.split())
    division = "2 to a reader" if workers else "4 to a reader"
    assert (
        f"12 images in 4 shards of {photos_in_shards}, streamed: {division} in each pass, none left out"
        in out
    )
    assert "7 steps (1 of warm-up), 2.3 epochs" in out
    for step in (2, 5):
        folder, from_ = tmp_path / f"from{step}", tmp_path / "whole" / "checkpoints" / f"step_{step:07d}"
        run(streamed(photos_in_shards, folder, *options, f"--resume={from_}"))
        out = capsys.readouterr().out
        assert "readers" not in out
        assert "anew" not in out
        assert curve(folder) == curve(tmp_path / "whole")[step:]
        assert_equal(weights(folder, 7), weights(tmp_path / "whole", 7))
    assert curve(tmp_path / "whole")[2]["epoch"] == 1


def test_another_number_of_readers_is_told_and_goes_on(photos_in_shards, tmp_path, capsys):
    run(streamed(photos_in_shards, tmp_path / "a", "--max_steps=1"))
    half = tmp_path / "a" / "checkpoints" / "step_0000001"
    said = {}
    for name, options in {
        "workers": ("--data.workers=2",),
        "buffer": ("--data.shuffle_buffer=3",),
        "others": (f"--data.train={photos_in_shards}/{{00..02}}.tar",),
        "unstreamed": ("--data.streaming=false", "--data.size=null"),
    }.items():
        capsys.readouterr()
        run(streamed(photos_in_shards, tmp_path / name, "--max_steps=3", f"--resume={half}", *options))
        said[name] = " ".join(capsys.readouterr().out.split())
        assert [row["step"] for row in curve(tmp_path / name)] == [2, 3]
    assert (
        "readers (processes x loader processes) were 1, now 2: shards that nobody had begun"
        in said["workers"]
    )
    assert "the shuffle buffer was 4, now 3: shards that nobody had begun are divided anew" in said["buffer"]
    assert "data was 4 shards, is 3" in said["others"]
    assert "the shards are others: their stream begins anew" in said["others"]
    assert "the images were streamed before: their order is another one" in said["unstreamed"]
    run(small_run(photos_in_shards, tmp_path / "b", "--max_steps=1", "--optim.warmup_steps=1"))
    half = tmp_path / "b" / "checkpoints" / "step_0000001"
    run(streamed(photos_in_shards, tmp_path / "c", "--max_steps=2", f"--resume={half}"))
    assert "the images were not streamed before: their stream begins anew" in capsys.readouterr().out


def test_an_address_that_dies_while_it_is_trained_on(
    photos_in_shards,
    tmp_path,
    capsys,
    monkeypatch,
    server,  # noqa: F811
):
    handler, address = server
    handler.folder = photos_in_shards
    size = (photos_in_shards / "01.tar").stat().st_size
    text = f"{address}/{{00..03}}.tar"
    handler.limits["01.tar"] = [1000, 500] * 2  # taken up again
    run(streamed(text, tmp_path / "whole", "--max_steps=6"))
    run(streamed(photos_in_shards, tmp_path / "disk", "--max_steps=6"))
    assert [row["loss"] for row in curve(tmp_path / "whole")] == [
        row["loss"] for row in curve(tmp_path / "disk")
    ]
    assert any(asked for _, asked in handler.log)
    capsys.readouterr()

    handler.limits["01.tar"] = [2000, 0, 0, 0, 0] * 99
    run(streamed(text, tmp_path / "skipped", "--max_steps=6", "--data.max_unreadable=0.3"))
    reason = f"{address}/01.tar: the connection broke off (after 2000 of {size} bytes), 5 times in a row"
    out = " ".join(capsys.readouterr().out.split())
    assert f"skipped the rest of the shard {reason}" in out
    assert "0 unreadable images and the rest of 1 shards were skipped" in out
    assert (tmp_path / "skipped" / "skipped_images.txt").read_text() == f"{reason}\n"

    def die():
        handler.limits.update({f"{shard:02}.tar": [2000, 0, 0, 0, 0] * 99 for shard in range(4)})

    handler.limits.clear()
    at_step(monkeypatch, 2, die)
    options = ("--max_steps=6", "--data.max_unreadable=0")
    error = error_of(capsys, streamed(text, tmp_path / "stopped", *options))
    assert "1 of 4 shards could not be read to their end" in error
    assert "the connection broke off (after 2000 of" in error
    (kept,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    handler.limits.clear()
    run(streamed(text, tmp_path / "stopped", "--max_steps=6", "--resume=true"))
    expected = {row["step"]: row["loss"] for row in curve(tmp_path / "whole")}
    found = {row["step"]: row["loss"] for row in curve(tmp_path / "stopped")}
    assert 2 <= int(kept.name[-7:]) < 6
    assert sorted(found) == list(range(1, 7))
    assert {step: found[step] for step in expected} == expected, "what died and came back changed nothing"


def test_a_rollback_goes_on_in_the_stream(photos_in_shards, tmp_path, monkeypatch):
    seen = []
    original = MaskedBatches.__call__

    def call(self, samples):
        seen.append([sample["name"] for sample in samples])
        return original(self, samples)

    options = (
        "--checkpoint_every=2",
        "--guard.on_nonfinite=rollback",
        "--max_steps=5",
        "--keep_checkpoints=9",
    )
    with monkeypatch.context() as patch:
        patch.setattr(MaskedBatches, "__call__", call)
        spoiled(patch, {4}, lambda loss: loss * float("nan"))
        run(streamed(photos_in_shards, tmp_path / "run", *options))
        trained = seen[-7:]  # 4, back behind 2, 3 more
        seen.clear()
        run(streamed(photos_in_shards, tmp_path / "plain", "--max_steps=7"))
    assert trained == seen[-7:], "no image of the stream is passed over or repeated"
    rows = curve(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 5]
    assert rows[2]["event"] == "rollback"
    half = tmp_path / "run" / "checkpoints" / "step_0000004"
    run(streamed(photos_in_shards, tmp_path / "again", *options, f"--resume={half}"))
    assert curve(tmp_path / "again") == rows[-1:]


def test_streams_that_cannot_be_trained_on_are_sentences(
    photos_in_shards, tmp_path, capsys, parquet, monkeypatch
):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    base = "--data.streaming=true"
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo" / "a.png").write_bytes(png(1))
    page = tmp_path / "page.tar"
    page.write_bytes(b"<!DOCTYPE html><title>Sign in</title>" + bytes(2000))
    shards_ = str(photos_in_shards)
    for source, options, words in [
        (shards_, (base, "--max_steps=null"), "is known only when all were read: add --data.size N"),
        (shards_, (base, "--optim.warmup_steps=null"), "with --max_steps and --optim.warmup_steps"),
        (
            shards_,
            (base, "--data.workers=5"),
            "has 4 shards for 5 readers (1 processes x 5 loader processes)",
        ),
        (shards_, ("--data.size=5",), "data.size must be null without data.streaming true"),
        (
            shards_,
            (base, "--data.shuffle_buffer=0"),
            "data.shuffle_buffer must be a whole number above 0, got 0",
        ),
        (tmp_path / "photo", (base,), "leave data.streaming false, its images can be read in any order"),
        (page, (base,), "page.tar is a web page, no tar file"),
        ("http://127.0.0.1:9/a.tar", (base,), "the connection broke off"),
        (f"hf:{parquet}:train:label", (base,), "holds no images: it has photo (Image)"),
    ]:
        assert words in error_of(capsys, small_run(source, tmp_path / "run", *options)), words
        assert not (tmp_path / "run").exists()


def test_parquet_trains_and_states_its_size(parquet, tmp_path, capsys):
    """Of a size that nobody states: as many passes as all readers have finished."""
    options = (
        "--data.streaming=true",
        "--data.shuffle_buffer=2",
        "--data.max_unreadable=0.5",
        "--max_steps=4",
    )
    run(small_run(f"hf:{parquet}", tmp_path / "run", *options, "--data.workers=1"))
    out = " ".join(capsys.readouterr().out.split())
    assert "streamed: 3 to a reader in each pass" in out
    assert len(curve(tmp_path / "run")) == 4
