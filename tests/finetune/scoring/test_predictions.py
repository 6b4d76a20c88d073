"""evaluate.py on folders of predictions and baselines, under several protocols at once; no model is needed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.depth_data import open_depth_data
from finetune.depth_data.depth_files import npy_bytes, pfm_bytes, png_bytes
from finetune.evaluate import main
from finetune.protocols import PROTOCOLS, get_protocol
from finetune.protocols.metrics import METRICS
from finetune.scoring.depth import score_pair
from finetune.scoring.sources import mean_depth
from tests.depth_world import make_depth_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_world(tmp_path_factory.mktemp("world"), train=3, val=4)


def run(world: Path, output: Path, *more: str) -> dict:
    main(["--data.root", str(world), "--data.list", "nyu_val.txt", "--output", str(output), *more])
    return json.loads(output.read_text())


def predict(
    world: Path, folder: Path, kinds: tuple[str, ...] = (".npy", ".pfm", ".png", "_mm.png")
) -> list[np.ndarray]:
    """A file of each kind in turn; what is in them."""
    data, depths = open_depth_data(world, "nyu_val.txt"), []
    folder.mkdir()
    for index, name in enumerate(data.names()):
        kind = kinds[index % len(kinds)]
        depth = (
            np.random.default_rng(index).uniform(1, 5, data[index].metres.shape).round(3).astype(np.float32)
        )
        content = {".npy": npy_bytes(depth), ".pfm": pfm_bytes(depth)}.get(kind) or png_bytes(depth)[0]
        path = folder / (name.rpartition(".")[0] + kind)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        depths.append(depth)
    return depths


def test_files_of_every_kind_under_several_protocols(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    depths = predict(world, tmp_path / "depth")
    where = ("--predictions", str(tmp_path / "depth"))
    both = run(world, tmp_path / "both.json", *where, "--protocol", "nyu-bts-scaled,nyu-affine")
    data = open_depth_data(world, "nyu_val.txt")
    assert [results["protocol"] for results in both["protocols"]] == ["nyu-bts-scaled", "nyu-affine"]
    for results in both["protocols"]:
        protocol = get_protocol(results["protocol"])
        assert results["protocol_hash"] == protocol.hash()
        assert results["settings"] == protocol.record()
        assert results["predictions"] == str(tmp_path / "depth")
        for index, row in enumerate(results["per_image"]):
            expected = score_pair(protocol, depths[index], data[index].metres)
            assert row["rmse"] == pytest.approx(expected["rmse"], rel=1e-5)
        assert results["intervals"]["rmse"][0] < results["metrics"]["rmse"] < results["intervals"]["rmse"][1]
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "nyu-" in line and "m" not in line[20:]) <= 90
    one = run(world, tmp_path / "one.json", *where, "--protocol", "nyu-bts-scaled")
    assert one["metrics"] == both["protocols"][0]["metrics"]
    every = run(world, tmp_path / "all.json", *where, "--protocol", "all")
    assert {results["protocol"] for results in every["protocols"]} | every["left_out"].keys() == set(
        PROTOCOLS
    )
    assert "480x640" in every["left_out"]["nyu-bts"]
    assert every["left_out"]["kitti-eigen"] == "not of nyu, which this data set is"


def test_missing_predictions_are_refused_or_counted(world, tmp_path, capsys):
    predict(world, tmp_path / "depth", (".npy",))
    (tmp_path / "depth/val_scene/rgb_0002.npy").unlink()
    options = ("--predictions", str(tmp_path / "depth"), "--protocol", "nyu-bts-scaled")
    with pytest.raises(SystemExit, match="2"):
        run(world, tmp_path / "no.json", *options)
    said = capsys.readouterr().err
    assert "1 of 4 images have no prediction" in said
    assert "val_scene/rgb_0002.png" in said
    assert not (tmp_path / "no.json").exists()
    results = run(world, tmp_path / "some.json", *options, "--missing", "skip")
    assert (results["images"], results["missing"]) == (3, ["val_scene/rgb_0002.png"])
    assert (
        "1 image without a prediction left out, the first is val_scene/rgb_0002.png"
        in capsys.readouterr().out
    )


def test_predictions_that_are_not_of_the_frame_or_not_metres(world, tmp_path, capsys):
    predict(world, tmp_path / "depth", (".npy",))
    options = ("--predictions", str(tmp_path / "depth"), "--protocol", "nyu-bts-scaled")
    with pytest.raises(SystemExit, match="2"):
        run(world, tmp_path / "no.json", *options, "--holds", "disparity")
    assert "use --protocol nyu-affine" in capsys.readouterr().err
    (tmp_path / "depth/val_scene/rgb_0001.npy").write_bytes(npy_bytes(np.ones((32, 32))))
    with pytest.raises(SystemExit, match="2"):
        run(world, tmp_path / "no.json", *options)
    assert "the prediction is 32x32, its image 48x64" in capsys.readouterr().err
    assert not (tmp_path / "no.json").exists()


def test_a_prediction_without_a_usable_value_is_the_worst_and_told(world, tmp_path, capsys):
    """Under an alignment too, which would make the best constant of it."""
    predict(world, tmp_path / "depth", (".npy",))
    for name, value in (("rgb_0001", np.nan), ("rgb_0002", -1.0)):
        (tmp_path / f"depth/val_scene/{name}.npy").write_bytes(npy_bytes(np.full((48, 64), value)))
    where = ("--predictions", str(tmp_path / "depth"), "--protocol", "nyu-bts-scaled,nyu-affine")
    every = run(world, tmp_path / "r.json", *where)["protocols"]
    for results in every:
        assert results["unusable"] == ["val_scene/rgb_0001.png", "val_scene/rgb_0002.png"]
        for row in results["per_image"][1:3]:
            assert row["delta3"] == 0
            assert row["abs_rel"] == pytest.approx(1, abs=1e-2)
        assert results["per_image"][0]["delta3"] > 0
    said = capsys.readouterr().out
    assert "no value of the prediction could be used of 2 images, scored as 0.001 m everywhere" in said
    assert "with nothing fitted: val_scene/rgb_0001.png, val_scene/rgb_0002.png" in said
    # scale and shift of depth take any sign, a median does not
    for name in ("nyu-marigold", "kitti-monodepth2"):
        protocol = replace(PROTOCOLS[name], crop=None, crop_shares=None, frame=None)
        truth = np.array([[2.0, 4.0]], np.float32)
        assert score_pair(protocol, np.full((1, 2), np.nan), truth)["delta3"] == 0
        assert (score_pair(protocol, np.full((1, 2), -1.0), truth)["delta3"] == 0) == (
            name == "kitti-monodepth2"
        )


def test_baselines(world, tmp_path):
    constant = run(world, tmp_path / "c.json", "--baseline", "constant:2.5", "--protocol", "nyu-bts-scaled")
    data, protocol = open_depth_data(world, "nyu_val.txt"), get_protocol("nyu-bts-scaled")
    expected = score_pair(protocol, np.full((48, 64), 2.5), data[1].metres)
    for name in METRICS:
        assert constant["per_image"][1][name] == pytest.approx(expected[name])
    options = ("--baseline", "mean", "--baseline_list", "nyu_train.txt", "--protocol", "nyu-bts-scaled")
    mean = run(world, tmp_path / "m.json", *options)
    training = open_depth_data(world, "nyu_train.txt")
    maps = np.stack([training[index].metres for index in range(3)]).astype(np.float64)
    by_hand = np.ma.masked_equal(maps, 0).mean(0)
    np.testing.assert_allclose(mean_depth(training), by_hand.filled(maps[maps > 0].mean()), rtol=1e-6)
    expected = score_pair(protocol, mean_depth(training), data[0].metres)
    assert mean["per_image"][0]["rmse"] == pytest.approx(expected["rmse"])
    assert mean["baseline"] == "mean"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --model, --predictions and --baseline, not none of them"),
        (["--baseline", "mean", "--model", "x"], "not model and baseline"),
        (["--baseline", "constant:-1"], "baseline must be constant:METRES"),
        (
            ["--baseline", "constant:1", "--protocol", "kitti-eigen"],
            "kitti-eigen is of kitti, and this is nyu",
        ),
        (["--baseline", "constant:1", "--protocol", "nyu-bts,nyu-bts"], "each once"),
        (["--predictions", "nowhere"], "no folder nowhere"),
        (["--predictions", "."], "4 of 4 images have no prediction"),
    ],
)
def test_user_errors_are_sentences(world, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(world, tmp_path / "results.json", *options)
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "results.json").exists()


def test_a_folder_in_millimetres_is_said(world, tmp_path, capsys):
    for depth, path in zip(
        predict(world, tmp_path / "mm", (".npy",)), sorted((tmp_path / "mm").rglob("*.npy")), strict=True
    ):
        np.save(path, depth * 1000)
    where = ("--predictions", str(tmp_path / "mm"), "--protocol", "nyu-bts-scaled")
    results = run(world, tmp_path / "mm.json", *where)
    assert (results["beyond_pixels"], results["beyond_images"], results["beyond_share"]) == (
        4 * 48 * 64,
        4,
        1,
    )
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "12288 predicted values, in 4 images, beyond 10 m, the farthest depth of the protocol: scored as that depth: "
        "are they in another unit than metres (--scale)?" in said
    )
    right = run(world, tmp_path / "m.json", *where, "--scale", "0.001")
    assert "beyond_pixels" not in right
    assert right["metrics"]["rmse"] < results["metrics"]["rmse"]
    assert "beyond" not in capsys.readouterr().out


def test_some_values_beyond_the_farthest_depth_are_counted_only(world, tmp_path, capsys):
    depths = predict(world, tmp_path / "depth", (".npy",))
    path = sorted((tmp_path / "depth").rglob("*.npy"))[0]
    depths[0][:2, :3] = 11
    depths[0][2, :3] = np.nan, np.inf, -1
    np.save(path, depths[0])
    results = run(
        world, tmp_path / "r.json", "--predictions", str(tmp_path / "depth"), "--protocol", "nyu-bts-scaled"
    )
    counts = [results[f"{what}_pixels"] for what in ("beyond", "nonfinite", "nonpositive")]
    assert counts == [6, 2, 1]
    assert "in another unit" not in capsys.readouterr().out


def test_predictions_of_another_size_are_said(world, tmp_path, capsys):
    predict(world, tmp_path / "depth", (".npy",))
    for path in sorted((tmp_path / "depth").rglob("*.npy"))[:3]:
        np.save(path, np.load(path)[::2, ::2])
    where = ("--predictions", str(tmp_path / "depth"), "--protocol", "nyu-bts-scaled,nyu-affine")
    results = run(world, tmp_path / "r.json", *where)
    assert [one["resized_images"] for one in results["protocols"]] == [3, 3]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 predictions of another size than the image, brought to the size of the ground truth" in said


def test_a_protocol_of_another_benchmark_is_a_sentence(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(world, tmp_path / "r.json", "--baseline", "constant:3", "--protocol", "kitti-eigen")
    assert stopped.value.code == 2
    assert "protocol kitti-eigen is of kitti, and this is nyu" in capsys.readouterr().err
