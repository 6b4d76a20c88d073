"""finetune/commands/calibrate.py: points, pairs and cameras; and that prediction applies what it found."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from finetune import DepthModel, load_depth_model
from finetune.commands.calibrate import main
from finetune.evaluate import main as evaluate
from finetune.model.calibration import for_intrinsics
from finetune.model.prediction import predict_image
from finetune.predict import main as predict
from tests.depth_world import make_depth_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and two models, one of them without metres."""
    root = tmp_path_factory.mktemp("calibrate")
    make_depth_world(root / "data")
    torch.manual_seed(0)
    DepthModel("test_resnet", head="linear", image_size=(48, 64)).save(root / "metric")
    relative = DepthModel("test_resnet", head="fusion", width=8, image_size=(48, 64))
    torch.nn.init.normal_(relative.head.core.relative.weight, std=3.0)  # so that it says something
    relative.save(root / "relative")
    return root


def run(world: Path, *options: str, model: str = "metric") -> None:
    main([f"--model={world / model}", "--device=cpu", *options])


def image_of(world: Path) -> Path:
    return world / "data" / "val_scene" / "rgb_0000.png"


def test_points_scale_what_predict_writes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_of(world)
    predicted = predict_image(load_depth_model(world / "metric"), cv2.imread(str(image))[..., ::-1].copy())
    places = [(5, 40), (60, 3), (31, 24)]
    points = "; ".join(f"{x},{y},{2.5 * predicted[y, x]}" for x, y in places)
    run(world, f"--image={image}", f"--points={points}", f"--output={tmp_path / 'model'}")
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 known distances in rgb_0000.png" in printed
    assert "mean relative error before: 0.600" in printed  # (2.5 - 1) / 2.5
    assert "of what was left out of the fit: 0.000" in printed
    assert predict([f"--model={tmp_path / 'model'}", f"--input={image}", f"--output={tmp_path / 'out'}"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out" / "rgb_0000.npy"), 2.5 * predicted, rtol=1e-4)
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert report["calibration"]["space"] == "log_depth"
    assert "calibration" not in json.loads((world / "metric" / "config.json").read_text())

    assert "still describes" not in printed

    # once more, from a file, in place: the earlier calibration is neither kept nor multiplied
    (tmp_path / "model" / "README.md").write_text("a model card")
    (tmp_path / "points.csv").write_text(f"image,x,y,metres\n{image},5,40,{3 * predicted[40, 5]}\n")
    main(
        [
            f"--model={tmp_path / 'model'}",
            f"--points={tmp_path / 'points.csv'}",
            "--in_place=true",
            "--device=cpu",
        ]
    )
    printed = capsys.readouterr().out
    assert "takes the place of: calibrated" in printed
    assert f"{tmp_path / 'model' / 'README.md'} still describes the model before this calibration" in printed
    again = load_depth_model(tmp_path / "model").calibration
    assert again is not None
    assert again.shift == pytest.approx(np.log(3))


def test_pairs_give_a_factor(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"--data.root={world / 'data'}", "--data.list=nyu_train.txt", "--pairs=4"]
    run(world, *data, f"--output={tmp_path / 'model'}", "--space=depth")
    assert "scale in depth fitted to 4 pairs of nyu_train.txt" in " ".join(capsys.readouterr().out.split())
    found = load_depth_model(tmp_path / "model").calibration
    assert found is not None
    # An untrained model says 2.7 m everywhere, so the best factor brings that among the readings of those four.
    files = sorted((world / "data" / "train_scene").glob("sync_depth_*.png"))
    truth = [cv2.imread(str(files[index]), cv2.IMREAD_UNCHANGED)[2:-2, 2:-2] / 1000 for index in (0, 2, 3, 5)]
    readings = np.concatenate([depth[depth > 0] for depth in truth])
    assert np.median(readings) - 1 < 2.7 * found.scale < np.median(readings) + 1
    assert found.errors["after"] == pytest.approx(
        np.mean(np.abs(2.7 * found.scale - readings) / readings), rel=0.05
    )


def test_evaluation_applies_and_states_it(world: Path, tmp_path: Path) -> None:
    model = load_depth_model(world / "metric")
    model.calibrate(for_intrinsics(1.25, 1e-3, 10.0, "a quarter more"))
    model.save(tmp_path / "model")
    results = []
    for folder in (world / "metric", tmp_path / "model"):
        output = tmp_path / "results.json"
        data = [f"--data.root={world / 'data'}", "--data.list=nyu_val.txt", "--protocol=nyu-bts-scaled"]
        evaluate([f"--model={folder}", *data, f"--output={output}", "--device=cpu"])
        results.append(json.loads(output.read_text()))
    plain, calibrated = results
    assert "calibration" not in plain
    assert calibrated["calibration"]["scale"] == 1.25
    assert calibrated["metrics"]["silog"] == pytest.approx(
        plain["metrics"]["silog"], rel=1e-4
    )  # knows no scale
    for one, other in zip(plain["per_image"], calibrated["per_image"], strict=True):
        assert other["rmse"] != pytest.approx(one["rmse"], rel=0.01)


def test_a_wrong_point_counts_less_where_that_is_asked_for(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_of(world)
    predicted = predict_image(load_depth_model(world / "metric"), cv2.imread(str(image))[..., ::-1].copy())
    places = [(5, 40, 2.5), (60, 3, 2.5), (31, 24, 2.5), (9, 9, 2.5)]
    places.append((50, 30, 25))  # a slip of the decimal point
    points = "; ".join(f"{x},{y},{factor * predicted[y, x]}" for x, y, factor in places)
    options = (f"--image={image}", f"--points={points}", "--outliers=downweight")
    run(world, *options, f"--output={tmp_path / 'model'}")
    calibration = load_depth_model(tmp_path / "model").calibration
    assert calibration is not None
    assert calibration.scale == 1  # in log depth: the scale of depth is its shift
    assert calibration.shift == pytest.approx(np.log(2.5), abs=0.01)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 5 points contradict the others or the model (point 5 at x 50, y 30: measured " in printed
    assert "and counted less" in printed
    assert calibration.max_depth == pytest.approx(2.5 * 10, rel=0.01), "the slip, 67 m, is no farthest depth"
    right = points.rpartition(";")[0]
    run(world, f"--image={image}", f"--points={right}", "--outliers=downweight", f"--output={tmp_path / 'b'}")
    assert "no point contradicts the others" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(world, *options, "--max_depth=4", f"--output={tmp_path / 'c'}")
    assert "max_depth 4 m is nearer than a known distance" in capsys.readouterr().err


def test_points_give_metres_to_a_head_without(world: Path, tmp_path: Path) -> None:
    image = image_of(world)
    inverse = predict_image(load_depth_model(world / "relative"), cv2.imread(str(image))[..., ::-1].copy())
    places = [(int(at) % 64, int(at) // 64) for at in np.argsort(inverse.ravel())[[0, 1000, 2000, -1]]]
    truth = 1 / (inverse / inverse.max() + 0.125)  # from 0.9 to 8 m
    points = "; ".join(f"{x},{y},{truth[y, x]}" for x, y in places)
    run(world, f"--image={image}", f"--points={points}", f"--output={tmp_path / 'model'}", model="relative")
    assert load_depth_model(tmp_path / "model").outputs == ("disparity_affine", "depth")
    assert predict([f"--model={tmp_path / 'model'}", f"--input={image}", f"--output={tmp_path / 'o'}"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "o" / "rgb_0000.npy"), truth, rtol=0.01)


def test_a_longer_lens_sees_things_nearer_than_they_are(world: Path, tmp_path: Path) -> None:
    (tmp_path / "phone.json").write_text(
        json.dumps({"fx": 3000, "fy": 3000, "cx": 0, "cy": 0, "width": 3000, "height": 4000})
    )
    run(world, f"--camera={tmp_path / 'phone.json'}", f"--output={tmp_path / 'model'}")
    found = load_depth_model(tmp_path / "model").calibration
    assert found is not None
    assert found.scale == pytest.approx((3000 / 4000) / (518.858 / 640))
    assert found.max_depth == pytest.approx(10 * found.scale)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        (["--points=1,1,2"], "metric", "does not say in which image"),
        (["--points=1,1", "--image={image}"], "metric", "point 1 of 1,1 is not x, y and metres"),
        (["--points=;", "--image={image}"], "metric", "hold no known distance"),
        (["--points=64,1,2", "--image={image}"], "metric", "lies outside"),
        (["--points=1,1,-2", "--image={image}"], "metric", "distances are above 0"),
        (["--points=1,1,1; 2,2,9", "--image={image}"], "metric", "2 of 2 points contradict"),
        (
            ["--points=1,1,1; 9,9,1; 2,2,9; 8,8,9", "--image={image}", "--outliers=downweight"],
            "metric",
            "less weight does not tell which half is right",
        ),
        (
            ["--points=1,1,2", "--image={image}", "--fit=scale_shift"],
            "metric",
            "two known distances at least",
        ),
        (["--points=1,1,2", "--image={image}", "--fit=scale"], "relative", "needs scale and shift"),
        (["--points=1,1,2; 3,3,3", "--image={image}", "--space=depth"], "relative", "space disparity"),
        (["--points=1,1,2", "--image={image}x"], "metric", "give one that can be read"),
        (["--points=gone.csv"], "metric", "no file of points"),
        (["--camera=nyu"], "relative", "gives no metres to correct"),
        (
            ["--camera=nyu", "--data.root={image}"],
            "metric",
            "one of points, data.root and camera must be given",
        ),
        (["--camera=nyu", "--in_place=true"], "metric", "in_place true instead"),
        (["--data.root={data}", "--data.list=nyu_val.txt"], "metric", "has 2 pairs, 10 were asked for"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    model: str,
    message: str,
) -> None:
    given = [option.format(image=image_of(world), data=world / "data") for option in options]
    with pytest.raises(SystemExit, match="2"):
        run(world, *given, f"--output={tmp_path / 'model'}", model=model)
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("card", "is the model's own folder: give --in_place true instead"),
        ("other", "it holds README.md. Choose another folder"),
        ("notes.txt/deep", "notes.txt is a file: choose another folder"),
    ],
)
def test_an_output_that_would_cost_something_is_refused_before_the_fit(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    message: str,
) -> None:
    for name in ("card", "other"):
        shutil.copytree(world / "metric", tmp_path / name)
        (tmp_path / name / "README.md").write_text("a model card")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(
        "finetune.commands.work.calibrate.load_depth_model", lambda *_: pytest.fail("too late")
    )
    with pytest.raises(SystemExit, match="2"):
        main([f"--model={tmp_path / 'card'}", "--camera=nyu", f"--output={tmp_path / output}"])
    assert message in capsys.readouterr().err
    assert [(tmp_path / name / "README.md").read_text() for name in ("card", "other")] == ["a model card"] * 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_control_c_is_no_traceback(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.commands.work.calibrate.load_depth_model", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(world, "--camera=nyu", f"--output={tmp_path / 'model'}")
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
