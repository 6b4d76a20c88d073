"""finetune/evaluate.py: its table, results.json and figures, and what it refuses."""

import errno
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import DepthModel, load_depth_model
from finetune.depth_data import open_depth_data
from finetune.evaluate import main
from finetune.model.prediction import transform_of
from finetune.protocols import PROTOCOLS, get_protocol
from finetune.protocols.metrics import METRICS
from finetune.report.figures import HOLE_COLOUR, colourise, relative_error, shared_range, triptychs
from finetune.scoring.caveats import caveats
from finetune.scoring.depth import score_pair
from finetune.scoring.pictures import Triptych, WorstRows
from finetune.scoring.score import score
from finetune.scoring.sources import ModelSource
from tests.depth_world import make_depth_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_world(tmp_path_factory.mktemp("world"), train=1, val=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    depth_model = DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 8), image_size=(48, 64))
    return depth_model.save(tmp_path_factory.mktemp("run") / "model")


def run(model: Path, world: Path, output: Path, *more: str, protocol: str = "nyu-bts-scaled") -> dict:
    where = ["--model", str(model), "--data.root", str(world), "--data.list", "nyu_val.txt"]
    main([*where, "--protocol", protocol, "--output", str(output), "--device", "cpu", *more])
    return json.loads(output.read_text())


def test_results_and_table(
    model: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(model, world, tmp_path / "deep" / "results.json")
    assert (results["protocol"], results["images"]) == ("nyu-bts-scaled", 5)
    assert set(results["metrics"]) == set(METRICS)
    assert len(results["per_image"]) == 5
    assert results["per_image"][0]["name"] == "val_scene/rgb_0000.png"
    for name in METRICS:
        assert results["metrics"][name] == pytest.approx(np.mean([row[name] for row in results["per_image"]]))
    assert results["image_size"] == [48, 64]
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert results["model_sha256"]["weights"] == weights
    assert (results["ground_truth"], results["white_border"]) == (None, "keep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["results.json"]
    printed = capsys.readouterr().out
    for word in ("nyu-bts-scaled: 5 images", "AbsRel", f"{results['metrics']['abs_rel']:.3f}"):
        assert word in printed


def test_numbers_are_those_of_the_protocol_by_hand(model: Path, world: Path, tmp_path: Path) -> None:
    results = run(model, world, tmp_path / "results.json", "--batch_size", "2")
    depth_model, protocol = load_depth_model(model), get_protocol("nyu-bts-scaled")
    data = open_depth_data(world, "nyu_val.txt")
    for sample, row in zip([data[i] for i in range(len(data))], results["per_image"], strict=True):
        image = torch.from_numpy(sample.image / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (depth_model.mean, depth_model.std))
        with torch.no_grad():
            depth = depth_model(((image - mean) / std).float()[None]).depth[0, 0].numpy()
        expected = score_pair(protocol, depth, sample.depth)
        assert row["rmse"] == pytest.approx(expected["rmse"], rel=1e-4)
        assert row["delta1"] == pytest.approx(expected["delta1"], abs=1e-3)


@pytest.mark.parametrize(
    ("protocol", "truth", "said"),
    [
        ("nyu-laina", None, "filled depth, and this layout does not say which it has"),
        ("nyu-densedepth", "raw", "filled depth, and this is raw depth"),
        ("nyu-fastdepth", "filled", None),
        ("nyu-bts", "filled", "raw depth, and this is filled depth"),
        ("nyu-bts", "raw", None),
        ("nyu-bts", None, None),
    ],
)
def test_ground_truth_of_another_kind_is_told(protocol: str, truth: str | None, said: str | None) -> None:
    settings = PROTOCOLS[protocol].record()
    results = {
        "settings": settings,
        "images": 654,
        "ground_truth": truth,
        "skipped": [],
        "nonfinite_pixels": 0,
        "nonpositive_pixels": 0,
        "undefined": {},
    }
    told = [f"stands on {said}: published numbers stand on the former"] if said else []
    assert caveats(results) == told


def test_flip_average_is_an_option_that_results_state(model: Path, world: Path, tmp_path: Path) -> None:
    plain = run(model, world, tmp_path / "plain.json")
    flipped = run(model, world, tmp_path / "flipped.json", "--flip_average", "true")
    assert (plain["settings"]["flip_average"], flipped["settings"]["flip_average"]) == (False, True)
    assert plain["metrics"] != flipped["metrics"]
    depth_model = load_depth_model(model)
    images = torch.randn(2, 3, 48, 64)
    protocol = get_protocol("nyu-bts-scaled", flip_average=True)
    with torch.no_grad():
        by_hand = (depth_model(images).depth + depth_model(images.flip(-1)).depth.flip(-1)) / 2
    source = ModelSource(depth_model, transform_of(depth_model), {})
    predictions = source.predict([[image] for image in images], [protocol])
    averaged = [prediction.under(protocol, (48, 64))[0] for (prediction,) in predictions]
    np.testing.assert_allclose(averaged, by_hand[:, 0], rtol=1e-6)


def test_loader_processes_and_batches_change_nothing(model: Path, world: Path, tmp_path: Path) -> None:
    one = run(model, world, tmp_path / "one.json", "--batch_size", "5")
    two = run(model, world, tmp_path / "two.json", "--batch_size", "5", "--data.workers", "2")
    assert one["per_image"] == two["per_image"]


def test_a_run_that_is_scored_has_its_report_anew(model: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("encoder: test_resnet")
    run(model, world, tmp_path / "other.json")
    assert not (tmp_path / "report.html").exists()  # reports show results.json alone
    results = run(model, world, tmp_path / "results.json")
    assert f"{results['metrics']['silog']:.3f}" in (tmp_path / "report.html").read_text()


def test_another_image_size(model: Path, world: Path, tmp_path: Path) -> None:
    results = run(model, world, tmp_path / "results.json", "--image_size", "[96,128]")
    assert results["image_size"] == [96, 128]


def test_home_folder_is_expanded(
    model: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "world").symlink_to(world)
    main(
        [
            *("--model=~/model", "--data.root=~/world", "--data.list=~/world/nyu_val.txt"),
            *("--output=~/results.json", "--figures=~/figures", "--protocol=nyu-bts-scaled", "--device=cpu"),
        ]
    )
    assert (tmp_path / "results.json").is_file()
    assert (tmp_path / "figures" / "triptychs.png").is_file()


def test_the_model_returns_to_its_mode(model: Path, world: Path) -> None:
    depth_model = load_depth_model(model).train()
    before = {name: value.clone() for name, value in depth_model.state_dict().items()}
    data = open_depth_data(world, "nyu_val.txt")
    score(depth_model, data, get_protocol("nyu-bts-scaled"), transform_of(depth_model))
    assert depth_model.training
    for name, value in depth_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_images_without_ground_truth_are_listed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_depth_world(tmp_path / "world", train=1, val=3)
    cv2.imwrite(str(world / "val_scene" / "sync_depth_0001.png"), np.zeros((48, 64), np.uint16))
    results = run(model, world, tmp_path / "results.json")
    assert results["images"] == 2
    assert results["skipped"] == ["val_scene/rgb_0001.png"]
    assert " left out for want of a pixel that counts, the first is " in capsys.readouterr().out


def test_figures_draw_holes_apart(model: Path, world: Path, tmp_path: Path) -> None:
    run(model, world, tmp_path / "results.json", "--figures", str(tmp_path / "figures"), "--triptychs", "2")
    with Image.open(tmp_path / "figures" / "triptychs.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    hole = np.round(np.array(HOLE_COLOUR) * 255)
    assert (np.abs(pixels - hole).max(1) <= 1).sum() > 1000


def test_the_worst_rows_are_kept_in_their_order() -> None:
    worst, depth = WorstRows(3), np.ones((2, 2), np.float32)
    for name, error in zip("abcdef", (0.3, 0.9, 0.1, 0.9, 0.2, 0.5), strict=True):
        assert worst.wants(error) == (name not in "e")
        worst.add(error, Triptych(np.zeros((2, 2, 3), np.uint8), depth, depth, name))
    assert [row.name for row in worst.rows] == ["b", "d", "f"]
    assert not WorstRows(0).wants(1.0)


def test_the_error_map_averages_to_abs_rel() -> None:
    truth = np.array([[2.0, 4.0], [0.0, np.nan]])
    error = relative_error(truth, np.array([[1.0, 5.0], [3.0, 3.0]]))
    np.testing.assert_array_equal(error, [[-0.5, 0.25], [np.nan, np.nan]])
    assert relative_error(np.full((4, 6), 2.0), np.full((2, 3), 3.0)) == pytest.approx(np.full((4, 6), 0.5))


def test_colours_have_one_stated_range() -> None:
    depth = np.array([[0.0, np.nan, 0.5, 2.0, 9.0, 50.0]], np.float32)
    colours = colourise(depth, 0.5, 9.0)
    hole = np.round(np.array(HOLE_COLOUR) * 255)
    assert np.abs(colours[0, :2] - hole).max() <= 1
    assert np.array_equal(colours[0, 4], colours[0, 5])  # beyond the far end
    assert len({tuple(colour) for colour in colours[0, 1:5]}) == 4
    assert shared_range([depth]) == (0.0, 49.0)
    assert shared_range([np.full((2, 2), 2.2), np.full((2, 2), 1.0)]) == (0.0, 2.5)
    assert shared_range([np.zeros((2, 2))]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="nothing to draw"):
        triptychs([])


def test_figures_leave_no_global_state() -> None:
    import matplotlib.pyplot as plt

    depth = np.ones((4, 6), np.float32)
    triptychs([Triptych(np.zeros((4, 6, 3), np.uint8), depth, depth, "name", "caption")])
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.list", "nyu_vla.txt"], "nyu_val.txt"),
        (["--data.root", "/no/such/folder"], "/no/such/folder"),
        (["--protocol", "nyu-bst"], "nyu-bts"),
        (["--protocol", "nyu-bts"], "480x640"),
        (["--model", "/no/model"], "is not a depth model"),
        (["--data.lists", "x"], "data.list"),
        (["--batch_size", "0"], "batch_size must be a whole number above 0"),
    ],
)
def test_user_errors_are_sentences(
    model: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(model, world, tmp_path / "results.json", *arguments)
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert message in errors
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_pair_stops_the_evaluation(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    world = make_depth_world(tmp_path / "world", train=1, val=3)
    image = world / "val_scene" / "rgb_0002.png"
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(SystemExit, match="2"):
        run(model, world, tmp_path / "results.json", "--data.workers", workers)
    errors = capsys.readouterr().err.strip()
    assert "rgb_0002.png" in errors
    assert "copy the file again" in errors
    assert len(errors.splitlines()) == 1


def test_real_nyu_pairs(
    model: Path, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (real_data / "nyu" / "nyu_val.txt").read_text().splitlines()[:3]
    (tmp_path / "three.txt").write_text("\n".join(lines) + "\n")
    where = ["--data.list", str(tmp_path / "three.txt"), "--figures", str(tmp_path)]
    results = run(model, real_data / "nyu", tmp_path / "results.json", *where, protocol="nyu-bts")
    assert (results["protocol"], results["images"]) == ("nyu-bts", 3)
    assert 0 < results["metrics"]["rmse"] < 10
    assert "654 images" in capsys.readouterr().out


def test_a_full_disk_does_not_lose_the_scores(
    model: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="2"):
        run(model, world, tmp_path / "results.json")
    said = capsys.readouterr()
    assert "the disk is full" in said.err
    headings = next(line for line in said.out.splitlines() if "AbsRel" in line)
    assert "δ1↑" in headings
    assert "SILog↓" in headings  # all in one line of 80 columns


def test_another_reading_of_the_white_border_than_the_runs_is_said(tmp_path, capsys) -> None:
    world = make_depth_world(tmp_path / "world", train=1, val=1, size=(480, 640))
    torch.manual_seed(0)
    tiny = DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 8), image_size=(48, 64))
    folder = tiny.save(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text(
        "encoder: test_resnet\ndata: {root: x, white_border: fill}\n"
    )
    results = run(folder, world, tmp_path / "keep.json")
    assert results["run_white_border"] == "fill"
    said = " ".join(capsys.readouterr().out.split())
    assert "the run of this model read its images with white border fill, here it is keep" in said
    assert "run_white_border" not in run(folder, world, tmp_path / "fill.json", "--data.white_border", "fill")
