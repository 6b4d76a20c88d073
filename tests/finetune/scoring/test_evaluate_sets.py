"""finetune/evaluate.py on KITTI, iBims-1, ReDWeb and pairs of NYU as they lie on disk."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finetune import DepthModel, load_depth_model
from finetune.depth_data import open_depth_data
from finetune.evaluate import main
from finetune.model.prediction import transform_of
from finetune.protocols import PROTOCOLS
from finetune.protocols.metrics import GEOMETRY_METRICS, METRICS
from finetune.scoring.caveats import caveats
from finetune.scoring.ibims import boundary_errors, planarity_errors
from finetune.scoring.metrics import own_metrics
from tests import depth_layouts as write

KITTI_SIZE, NYU_SIZE = (375, 1242), (480, 640)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    depth_model = DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 8), image_size=(48, 64))
    return depth_model.save(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write.write_kitti(tmp_path_factory.mktemp("kitti"), 1, KITTI_SIZE)


@pytest.fixture(scope="module")
def ibims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write.write_ibims(tmp_path_factory.mktemp("ibims"), 2, NYU_SIZE)


def run(model: Path, root: Path, protocol: str, output: Path, *more: str) -> dict:
    where = ["--model", str(model), "--data.root", str(root), "--protocol", protocol, "--device", "cpu"]
    main([*where, "--output", str(output), *more])
    return json.loads(output.read_text())


def predicted(model: Path, image: np.ndarray, size: tuple[int, int], flip: bool = False) -> np.ndarray:
    """What the model says of an image, brought to `size`; averaged with its mirror image, by corners, with `flip`."""
    depth_model = load_depth_model(model).eval()
    shown = transform_of(depth_model).prepare(image)[None]
    with torch.no_grad():
        depth = depth_model(shown).depth
        if flip:
            depth = (depth + depth_model(shown.flip(-1)).depth.flip(-1)) / 2
    return F.interpolate(depth.double(), size=size, mode="bilinear", align_corners=flip)[0, 0].numpy()


# --- KITTI


@pytest.mark.parametrize(
    ("protocol", "rows", "columns"),
    [
        ("kitti-garg-full", (153, 371), (44, 1197)),
        ("kitti-eigen", (124, 342), (44, 1197)),
        ("kitti-garg-kb", (23 + 143, 23 + 349), (13 + 43, 13 + 1172)),
    ],
)
def test_crops_of_kitti_by_hand(
    model: Path, kitti: Path, tmp_path: Path, protocol: str, rows: tuple, columns: tuple
) -> None:
    results = run(model, kitti, protocol, tmp_path / "r.json", "--data.list", "eigen.txt")
    sample = open_depth_data(kitti, "eigen.txt")[0]
    depth = np.zeros(KITTI_SIZE)
    if protocol == "kitti-eigen":
        depth = predicted(model, sample.image, KITTI_SIZE)
    else:  # the model is shown 352x1216 at the bottom, in the middle
        shown = np.ascontiguousarray(sample.image[23:, 13:1229])
        depth[23:, 13:1229] = predicted(model, shown, (352, 1216), protocol == "kitti-garg-kb")
    counts = np.zeros(KITTI_SIZE, bool)
    counts[slice(*rows), slice(*columns)] = True
    counts &= (sample.metres > 1e-3) & (sample.metres < 80)
    p, g = depth[counts].clip(1e-3, 80), sample.metres[counts].astype(np.float64)
    (row,) = results["per_image"]
    assert row["pixels"] == counts.sum()
    assert row["abs_rel"] == pytest.approx((np.abs(p - g) / g).mean(), rel=1e-4)
    assert row["rmse"] == pytest.approx(np.sqrt(((p - g) ** 2).mean()), rel=1e-4)


def test_monodepth2_on_laser_points(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(5, 60, 4000), rng.uniform(-20, 20, 4000), rng.uniform(-3, 0, 4000)], 1)
    root = write.write_kitti_laser(tmp_path / "kitti", points, KITTI_SIZE)
    results = run(model, root, "kitti-monodepth2", tmp_path / "r.json", "--data.list", "list.txt")
    sample = open_depth_data(root, "list.txt")[0]
    (row,) = results["per_image"]
    inside = sample.metres[153:371, 44:1197]
    assert row["pixels"] == (inside > 0).sum() > 100
    assert results["settings"]["alignment"] == "median"
    assert results["ground_truth"] == "laser" == results["settings"]["depth"]
    assert not [said for said in caveats(results) if "depth, and" in said]
    other = {**results, "settings": PROTOCOLS["kitti-garg-kb"].record()}
    assert "stands on benchmark depth, and this is laser depth: published numbers stand on the former" in (
        caveats(other)
    )


def test_densedepths_test_arrays_are_nyu_with_filled_depth(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = write.write_densedepth_test(tmp_path)
    results = run(model, where, "nyu-bts-scaled", tmp_path / "r.json")
    assert (results["ground_truth"], results["images"]) == ("filled", 2)
    with pytest.raises(SystemExit, match="2"):
        run(model, where, "kitti-eigen", tmp_path / "r.json")
    assert "protocol kitti-eigen is of kitti, and this is nyu" in capsys.readouterr().err


def test_results_say_how_the_truth_was_read_and_why_protocols_were_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write.write_diw(tmp_path / "diw")
    where = ("--data.list", "DIW_train_val.csv", "--data.polarity", "closer")
    written = run(model, root, "all", tmp_path / "r.json", *where)
    (results,) = written["protocols"]
    reading = {"polarity": "closer", "depth_scale": None, "bad_depth": "refuse", "white_border": "keep"}
    assert {key: results[key] for key in reading} == reading
    assert set(written["left_out"]) == set(PROTOCOLS) - {"diw"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out, ")]
    assert len(lines) == 2  # of other data; and what needs maps of depth
    assert "not of diw, which this data set is: nyu-bts, nyu-adabins" in lines[0]
    assert lines[1].endswith(": nyu-bts-scaled, nyu-affine")


def test_frames_that_are_too_small(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write.write_kitti(tmp_path / "kitti", 1)
    with pytest.raises(SystemExit, match="2"):
        run(model, root, "kitti-garg-kb", tmp_path / "r.json", "--data.list", "eigen.txt")
    assert "48x64 is too small" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_predictions_of_the_benchmarks_crop(
    kitti: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """352x1216 at the bottom, centred: as good as the frame that it was cut from, where nothing else counts."""
    sample, rng = open_depth_data(kitti, "eigen.txt")[0], np.random.default_rng(0)
    whole = rng.uniform(2, 60, KITTI_SIZE).astype(np.float32)
    where, scores = ("--data.root", str(kitti), "--data.list", "eigen.txt"), {}
    for name, depth in (("whole", whole), ("cropped", whole[23:375, 13:1229])):
        file = tmp_path / name / Path(sample.name).with_suffix(".npy")
        file.parent.mkdir(parents=True)
        np.save(file, depth)
        for protocol in ("kitti-garg-kb", "kitti-garg-full"):
            command = ["--predictions", str(tmp_path / name), *where, "--protocol", protocol]
            main([*command, "--output", str(tmp_path / "r.json")])
            scores[name, protocol] = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert scores["cropped", "kitti-garg-kb"] == scores["whole", "kitti-garg-kb"]
    assert scores["cropped", "kitti-garg-full"] == scores["whole", "kitti-garg-full"]
    capsys.readouterr()
    command = ["--predictions", str(tmp_path / "cropped"), *where]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--protocol", "kitti-eigen", "--output", str(tmp_path / "no.json")])
    said = capsys.readouterr().err
    assert "the prediction is 352x1216, of the crop of KITTI's benchmark" in said
    assert "use --protocol kitti-garg-full or kitti-garg-kb" in said
    assert not (tmp_path / "no.json").exists()
    main([*command, "--protocol", "all", "--output", str(tmp_path / "all.json")])
    every = json.loads((tmp_path / "all.json").read_text())
    assert [one["protocol"] for one in every["protocols"]] == ["kitti-garg-full", "kitti-garg-kb"]


# --- iBims-1


def test_ibims_official(model: Path, ibims: Path, tmp_path: Path) -> None:
    results = run(model, ibims, "ibims-official", tmp_path / "r.json")
    assert set(results["metrics"]) == {*METRICS, *GEOMETRY_METRICS}
    data = open_depth_data(ibims)
    flat, accuracy = [], []
    for sample in (data[0], data[1]):
        depth = predicted(model, sample.image, NYU_SIZE)
        assert sample.geometry is not None
        valid = sample.metres > 0
        for plane in sample.geometry.planes:
            errors = planarity_errors(depth, sample.metres, valid, plane, sample.geometry.camera)
            flat += [errors["pe_fla"]] if errors else []
        accuracy.append(boundary_errors(depth, sample.geometry.edges)["dbe_acc"])
    assert results["planes"] == len(flat) == 2  # the floors; walls of 20x30 px are too small here
    assert results["metrics"]["pe_fla"] == pytest.approx(np.mean(flat), rel=1e-3)
    assert results["metrics"]["dbe_acc"] == pytest.approx(np.mean(accuracy), rel=1e-3)
    for name in ("abs_rel", "dde_0"):
        assert results["metrics"][name] == pytest.approx(np.mean([row[name] for row in results["per_image"]]))
    assert results["unpredicted_pixels"] == 0
    every = [row["dde_0"] + row["dde_m"] + row["dde_p"] for row in results["per_image"]]
    assert every == pytest.approx([1, 1])


def test_ibims_by_the_other_version_of_its_script(model: Path, ibims: Path, tmp_path: Path) -> None:
    results = run(model, ibims, "ibims-official-symmetric", tmp_path / "r.json")
    sample = open_depth_data(ibims)[1]
    assert sample.geometry is not None
    depth = predicted(model, sample.image, NYU_SIZE)
    expected = boundary_errors(depth, sample.geometry.edges, "symmetric")
    assert results["per_image"][1]["dbe_com_sym"] == pytest.approx(expected["dbe_com_sym"], rel=1e-3)
    assert "dbe_com" not in results["metrics"]
    assert results["metrics"]["dbe_com_sym"] == pytest.approx(
        np.mean([row["dbe_com_sym"] for row in results["per_image"]])
    )
    assert results["settings"]["edges"] == "symmetric"


def test_ibims_zoedepth(model: Path, ibims: Path, tmp_path: Path) -> None:
    results = run(model, ibims, "ibims-zoedepth", tmp_path / "r.json")
    counts = [(open_depth_data(ibims)[n].metres[45:471, 41:601] > 0).sum() for n in (0, 1)]
    assert [row["pixels"] for row in results["per_image"]] == counts
    assert results["settings"]["flip_average"]


def test_pixels_without_a_prediction_are_left_out_of_ibims_and_told(
    ibims: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_depth_data(ibims)
    for sample in (data[0], data[1]):
        depth = sample.metres.copy()
        depth[100:110, 300:320], depth[200, 300:310] = np.nan, -1
        depth[depth == 0] = 5  # of the hole
        np.save(tmp_path / f"{sample.name}.npy", depth)
    main(
        [
            *("--predictions", str(tmp_path), "--data.root", str(ibims), "--protocol", "ibims-official"),
            *("--output", str(tmp_path / "r.json")),
        ]
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["unpredicted_pixels"] == 2 * 210
    assert (results["nonfinite_pixels"], results["nonpositive_pixels"]) == (400, 20)
    assert results["metrics"]["rmse"] == 0
    said = capsys.readouterr().out
    assert "420 pixels without a prediction above 0 left out" in said
    assert "scored as" not in said


def test_an_image_without_any_prediction_is_not_left_out_of_ibims(ibims: Path, tmp_path: Path) -> None:
    data = open_depth_data(ibims)
    for sample, depth in (
        (data[0], np.where(data[0].metres > 0, data[0].metres, 5)),
        (data[1], np.zeros(NYU_SIZE)),
    ):
        np.save(tmp_path / f"{sample.name}.npy", depth)
    command = ["--predictions", str(tmp_path), "--data.root", str(ibims), "--protocol", "ibims-official"]
    main([*command, "--output", str(tmp_path / "r.json")])
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["images"], results["skipped"], results["unusable"]) == (2, [], [data[1].name])
    row = results["per_image"][1]
    assert (row["delta1"], row["dbe_acc"], row["pe_fla"], row["unpredicted"]) == (0, 10, None, 0)
    assert results["metrics"]["delta1"] == 0.5


def test_ibims_needs_its_geometry(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write.write_ibims(tmp_path / "ibims", 1, geometry=False)
    with pytest.raises(SystemExit, match="2"):
        run(model, root, "ibims-official", tmp_path / "r.json")
    said = capsys.readouterr().err
    assert "unpack ibims1_core_mat.zip" in said
    assert "ibims-zoedepth" in said
    assert not (tmp_path / "r.json").exists()


# --- relations


def test_redweb(model: Path, tmp_path: Path) -> None:
    root = write.write_redweb(tmp_path / "redweb", 3)
    results = run(model, root, "redweb", tmp_path / "r.json")
    assert results["images"] == 3
    assert results["metrics"]["whdr"] == pytest.approx(1 - results["metrics"]["accuracy"])
    assert results["pairs"]["equal"] + results["pairs"]["unequal"] == 30_000
    assert results == run(model, root, "redweb", tmp_path / "r.json", "--batch_size", "1")


def test_only_the_metrics_of_a_protocol_are_printed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ReDWeb's pairs have no threshold, so their WKDR says nothing; titles of narrow tables are one line."""
    root = write.write_redweb(tmp_path / "redweb", 1)
    run(model, root, "redweb", tmp_path / "r.json")
    printed = capsys.readouterr().out
    assert "WHDR↓  accuracy↑" in printed
    assert "WKDR" not in printed
    assert "redweb: 1 image\n" in printed
    pairs = {"whdr": 0.2, "accuracy": 0.8, "wkdr": 0.3, "wkdr_equal": 0.996}
    for threshold, shown in ((0.0, ["whdr", "accuracy"]), (0.1, ["whdr", "accuracy", "wkdr"])):
        settings = PROTOCOLS["diw"].record() | {"threshold": threshold}
        assert list(own_metrics({"settings": settings, "metrics": pairs})) == shown


@pytest.mark.parametrize("protocol", ["nyu-wkdr", "nyu-wkdr-sampled"])
def test_wkdr(model: Path, tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    if protocol == "nyu-wkdr":
        root, where = write.write_nyu_pairs(tmp_path / "nyu"), ["--data.list", "points.csv"]
    else:
        root, where = write.write_sync(tmp_path / "nyu"), ["--data.list", "nyu_val.txt"]
    chosen = run(model, root, protocol, tmp_path / "val.json", *where)
    threshold = chosen["wkdr_threshold"]["value"]
    assert 0.11 <= threshold <= 1.5
    assert f"points {threshold:g}, chosen on these very images" in capsys.readouterr().out
    given = run(model, root, protocol, tmp_path / "test.json", *where, "--threshold", str(threshold))
    assert given["metrics"] == chosen["metrics"]
    assert "wkdr_threshold" not in given
    assert "chosen" not in capsys.readouterr().out
    data = open_depth_data(root, where[1])
    if protocol == "nyu-wkdr":  # read at the points, with the border continued from what the model was shown
        sample = data[0]
        assert sample.pairs is not None
        assert sample.relation is not None
        top, bottom, left, right = PROTOCOLS[protocol].seen_at(write.SIZE)
        assert (top, bottom, left, right) == (9, 38, 9, 54)
        depth_model = load_depth_model(model).eval()
        shown = np.ascontiguousarray(sample.image[top:bottom, left:right])
        with torch.no_grad():
            depth = depth_model(transform_of(depth_model).prepare(shown)[None]).depth
        inner = F.interpolate(depth.double(), size=(29, 45), mode="bilinear", align_corners=True)[
            0, 0
        ].numpy()
        whole = inner[np.ix_(np.arange(48).clip(9, 37) - 9, np.arange(64).clip(9, 53) - 9)]
        ya, xa, yb, xb = sample.pairs.astype(int).T
        difference = whole[ya, xa] - whole[yb, xb]
        wrong = np.where(np.abs(difference) <= threshold, 0, np.sign(difference)) != sample.relation
        assert chosen["per_image"][0]["wkdr"] == wrong.mean()


def test_data_without_what_a_protocol_needs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write.write_redweb(tmp_path / "redweb", 1)
    sync = write.write_sync(tmp_path / "sync", 1, 1)
    for data, protocol, message in (
        ([str(sync), "--data.list", "nyu_val.txt"], "nyu-wkdr", "no relations of points .*nyu-wkdr-sampled"),
        ([str(root)], "nyu-wkdr", "protocol nyu-wkdr is of nyu, and this is redweb"),
        ([str(root)], "ibims-official", "protocol ibims-official is of ibims, and this is redweb"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(model, Path(data[0]), protocol, tmp_path / "r.json", *data[1:])
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        run(model, root, "redweb", tmp_path / "r.json", "--figures", str(tmp_path / "figures"))
    assert "no maps to draw" in capsys.readouterr().err
