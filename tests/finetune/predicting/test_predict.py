"""finetune/predict.py on good, odd and broken images."""

import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import DepthModel, load_depth_model
from finetune.depth_data.depth_files import read_depth_file
from finetune.model.prediction import fitted_size, predict_image
from finetune.predict import main
from finetune.predicting.inputs import output_stems
from finetune.predicting.pointcloud import step_of
from finetune.report.figures import colourise, depth_map, save_figure, shortened
from spark.files import write_whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    depth_model = DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 8), image_size=(48, 64))
    return depth_model.save(tmp_path_factory.mktemp("run") / "model")


def photo(path: Path, height: int = 30, width: int = 40, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def run(model: Path, source: Path, output: Path, *more: str) -> int:
    return main(
        ["--model", str(model), "--input", str(source), "--output", str(output), "--device", "cpu", *more]
    )


def test_one_image(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photo(tmp_path / "room.jpg", 37, 61)
    assert run(model, source, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.json",
        "room.npy",
        "room_colour.png",
        "room_mm.png",
    ]
    depth = np.load(tmp_path / "out" / "room.npy")
    assert depth.dtype == np.float32
    assert depth.shape == (37, 61)
    assert ((depth > 0) & (depth < 10)).all()
    millimetres = cv2.imread(str(tmp_path / "out" / "room_mm.png"), cv2.IMREAD_UNCHANGED)
    assert millimetres is not None
    assert millimetres.dtype == np.uint16
    np.testing.assert_array_equal(millimetres, np.rint(depth.astype(np.float64) * 1000))
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert report["colour_range_m"] is None
    assert report["predicted"][0]["colours_m"] == pytest.approx(
        [np.percentile(depth, 1), max(np.percentile(depth, 99), np.percentile(depth, 1) + 0.1)]
    )
    assert report["predicted"][0]["size"] == [37, 61]
    assert report["failed"] == []
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 images predicted" in printed
    assert "colours over the range of each image (--colour_near and --colour_far fix them)" in printed


def test_folder_keeps_subfolders_and_names_apart(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    for number, name in enumerate(("a/x.png", "b/x.png", "x.png", "x.jpg", "b/deep/y.png")):
        photo(source / name, seed=number)
    assert run(model, source, tmp_path / "out") == 0
    arrays = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.npy")
    )
    assert arrays == ["a/x.npy", "b/deep/y.npy", "b/x.npy", "x.jpg.npy", "x.png.npy"]
    one, two = (np.load(tmp_path / "out" / name) for name in ("a/x.npy", "b/x.npy"))
    assert not np.array_equal(one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_output_inside_input_is_not_read_again(model: Path, tmp_path: Path) -> None:
    photo(tmp_path / "photos" / "x.png")
    for _ in range(2):
        assert run(model, tmp_path / "photos", tmp_path / "photos" / "depth") == 0
    assert len(list((tmp_path / "photos" / "depth").rglob("*.npy"))) == 1


def test_pictures_of_an_earlier_prediction_are_no_photos(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photo(photos / "x.png")
    photo(photos / "other" / "a.png")
    (photos / "other" / "predictions.json").write_text("[1, 2]")  # another program's
    assert run(model, photos, photos / "depth", "--formats", "[png,colour,side]") == 0
    photo(photos / "depth" / "mine.png")
    capsys.readouterr()
    assert run(model, photos, tmp_path / "out", "--formats", "[npy]") == 0
    arrays = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.npy")
    )
    assert arrays == ["depth/mine.npy", "other/a.npy", "x.npy"]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"left out: 6 files that an earlier prediction wrote, as {photos}/depth/predictions.json says"
        in printed
    )


def test_two_inputs_do_not_write_one_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("room.png", "room_mesh.png"):
        photo(tmp_path / "photos" / name)
    with pytest.raises(SystemExit, match="2"):
        run(model, tmp_path / "photos", tmp_path / "out", "--formats", "[ply,mesh]")
    said = capsys.readouterr().err
    assert "photos/room.png and " in said
    assert "photos/room_mesh.png would both be predicted into room_mesh.ply: rename one" in said
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_a_record_of_what_was_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path / "photos" / name)

    def full(path: Path, content: bytes) -> Path:
        if path.name == "b_mm.png":
            raise OSError(errno.ENOSPC, "the disk is full")
        return write_whole(path, content)

    monkeypatch.setattr("finetune.predicting.writers.write_whole", full)
    with pytest.raises(SystemExit, match="2"):
        run(model, tmp_path / "photos", tmp_path / "out", "--formats", "[npy,png]", "--batch_size", "1")
    printed = " ".join(capsys.readouterr().out.split())
    assert "predictions.json says what was written before" in printed
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["files"] for entry in report["predicted"]] == [["a.npy", "a_mm.png"]]
    assert report["failed"][0]["image"].endswith("b.png")
    assert "when these were written: b.npy" in report["failed"][0]["reason"]
    assert "the disk is full" in report["error"]
    assert not report["interrupted"]


def test_control_c_while_the_model_is_loaded_is_no_traceback(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.commands.work.predict.load_depth_model", stopped)
    with pytest.raises(SystemExit) as ended:
        run(model, photo(tmp_path / "x.png"), tmp_path / "out")
    assert ended.value.code == 130
    assert "interrupted before anything was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_thinned_clouds_are_reported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [step_of(pixels) for pixels in (1, 2_000_000, 2_000_001, 8_000_001)] == [1, 1, 2, 3]
    monkeypatch.setattr("finetune.predicting.writers.step_of", lambda pixels: 2)
    assert run(model, photo(tmp_path / "x.png"), tmp_path / "out", "--formats", "[ply]") == 0
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert report["predicted"][0]["every_row_and_column"] == 2
    assert "clouds and meshes of 1 inputs have only one row and column of 2" in " ".join(
        capsys.readouterr().out.split()
    )


def test_names_that_no_dropping_of_extensions_keeps_apart(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        photo(tmp_path / "photos" / name)
    stems = output_stems(tmp_path / "photos", tmp_path / "out")
    assert sorted(stems.values()) == ["a.jpg", "a.jpg.png", "a.png"]


def test_a_list_with_paths_upward_stays_inside_the_output(model: Path, tmp_path: Path) -> None:
    photo(tmp_path / "far" / "x.png")
    photo(tmp_path / "near" / "here" / "x.png")
    source = tmp_path / "near" / "list.txt"
    source.write_text(f"here/x.png\n../far/x.png\n{tmp_path}/far/../far/x.png\n")
    assert run(model, source, tmp_path / "out") == 0
    names = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.npy")
    )
    assert names == ["far/x.npy", "near/here/x.npy"]


def test_broken_images_are_skipped_and_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photos"
    photo(source / "good.png")
    whole = photo(source / "cut.jpg", 200, 200).read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "words.png").write_text("no image")
    (source / "empty.png").touch()
    assert run(model, source, tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 images predicted" in printed
    for name in ("cut.jpg", "words.png", "empty.png"):
        assert f"{name}:" in printed
    assert "words.png: not an image of a known kind" in printed
    assert "BufferedReader" not in printed
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 1
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["failed"]) == 3


def test_all_broken_is_a_failure(model: Path, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no image")
    assert run(model, tmp_path / "words.png", tmp_path / "out") == 1


def test_home_folder_is_expanded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model)
    photo(tmp_path / "x.png")
    assert main(["--model=~/model", "--input=~/x.png", "--output=~/out", "--device=cpu"]) == 0
    assert (tmp_path / "out" / "x.npy").is_file()


def test_exif_orientation_and_odd_modes(model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: 90 degrees clockwise to see it right
    photo(tmp_path / "photos" / "upright.jpg", 30, 40, exif=exif)
    Image.fromarray(np.full((20, 30), 128, np.uint8)).save(tmp_path / "photos" / "grey.png")
    Image.fromarray(np.zeros((20, 30, 4), np.uint8)).save(tmp_path / "photos" / "transparent.png")
    Image.fromarray(np.full((1, 1, 3), 9, np.uint8)).save(tmp_path / "photos" / "dot.png")
    assert run(model, tmp_path / "photos", tmp_path / "out") == 0
    shapes = {path.stem: np.load(path).shape for path in (tmp_path / "out").rglob("*.npy")}
    assert shapes == {"upright": (40, 30), "grey": (20, 30), "transparent": (20, 30), "dot": (1, 1)}


def test_options(model: Path, tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png")
    assert run(model, source, tmp_path / "out") == 0
    assert run(model, source, tmp_path / "flip", "--flip_average", "true", "--colour_far", "5") == 0
    plain, flipped = (np.load(tmp_path / name / "x.npy") for name in ("out", "flip"))
    assert flipped.dtype == np.float32
    assert not np.array_equal(plain, flipped)
    report = json.loads((tmp_path / "flip" / "predictions.json").read_text())
    assert report["colour_range_m"] == report["predicted"][0]["colours_m"] == [0.0, 5.0]


def test_every_format(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photo(tmp_path / "x.png"), tmp_path / "out"
    formats = "[npy,pfm,png,colour,side,ply,mesh]"
    assert run(model, source, out, "--formats", formats, "--png_scale", "0.002", "--tiles", "2") == 0
    names = [
        "predictions.json",
        "x.npy",
        "x.pfm",
        "x.ply",
        "x_colour.png",
        "x_depth.png",
        "x_mesh.ply",
        "x_side.png",
    ]
    assert sorted(path.name for path in out.iterdir()) == names
    depth = np.load(out / "x.npy")
    np.testing.assert_array_equal(read_depth_file(out / "x.pfm"), depth)
    np.testing.assert_allclose(read_depth_file(out / "x_depth.png"), depth, atol=0.00101)
    side = cv2.imread(str(out / "x_side.png"))
    np.testing.assert_array_equal(side[:, :40], cv2.imread(str(source)))
    assert side.shape == (30, 40 + 40 + 72, 3)
    report = json.loads((out / "predictions.json").read_text())
    assert report["predicted"][0]["camera"]["assumed"]
    assert "60 degrees of view along the long side were ASSUMED" in " ".join(capsys.readouterr().out.split())
    assert b"element vertex 1200\n" in (out / "x.ply").read_bytes()
    assert run(model, source, out, "--formats", "[ply]", "--camera", "50") == 0
    assert "ASSUMED" not in capsys.readouterr().out
    assert b"fx 42.9 px, 50 degrees across, the stated field of view" in (out / "x.ply").read_bytes()


def test_a_camera_of_another_image_is_not_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "photos" / "upright.png", 40, 30)
    photo(tmp_path / "photos" / "across.png", 30, 40)
    camera = {"fx": 500, "fy": 500, "cx": 320, "cy": 240, "width": 640, "height": 480}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    more = ["--formats", "[npy,ply]", "--camera", str(tmp_path / "camera.json")]
    assert run(model, tmp_path / "photos", tmp_path / "out", *more) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "across.npy",
        "across.ply",
        "predictions.json",
    ]
    assert "upright.png: the intrinsics of camera.json are of 480x640, the image is 40x30" in " ".join(
        capsys.readouterr().out.split()
    )


def test_images_of_one_size_go_together_and_come_out_the_same(model: Path, tmp_path: Path) -> None:
    for number, size in enumerate([(30, 40), (30, 40), (40, 30), (30, 40), (30, 40), (60, 80)]):
        photo(tmp_path / "photos" / f"{number}.png", *size, seed=number)
    assert run(model, tmp_path / "photos", tmp_path / "one", "--batch_size", "1", "--formats", "[npy]") == 0
    assert run(model, tmp_path / "photos", tmp_path / "four", "--batch_size", "4", "--formats", "[npy]") == 0
    for number in range(6):
        one, four = (np.load(tmp_path / name / f"{number}.npy") for name in ("one", "four"))
        np.testing.assert_allclose(one, four, rtol=1e-4)


def test_images_of_too_many_pixels_are_not_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, photo(tmp_path / "x.png"), tmp_path / "out", "--max_pixels", "1000") == 1
    assert "40 x 30 pixels are more than max_pixels = 1000" in " ".join(capsys.readouterr().out.split())


def test_flip_average_of_an_image_and_its_mirror_agree(model: Path) -> None:
    depth_model = load_depth_model(model)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    one = predict_image(depth_model, image, flip_average=True)
    other = predict_image(depth_model, np.ascontiguousarray(image[:, ::-1]), flip_average=True)
    np.testing.assert_allclose(one, other[:, ::-1], rtol=1e-5)


def test_a_photo_is_predicted_in_one_call(model: Path, tmp_path: Path) -> None:
    source = photo(tmp_path / "x.png", 37, 61)
    assert run(model, source, tmp_path / "out", "--tiles=2", "--flip_average=true", "--formats=[npy]") == 0
    depth_model = load_depth_model(model)
    with Image.open(source) as opened:
        pixels = np.asarray(opened)
        for given in (source, str(source), opened, pixels):
            depth = depth_model.predict(given, tiles=2, flip_average=True)
            assert (depth.dtype, depth.shape) == (np.float32, (37, 61))
            np.testing.assert_array_equal(depth, np.load(tmp_path / "out" / "x.npy"))
    assert depth_model.predict(pixels[..., 0]).shape == (37, 61)  # grey
    with pytest.raises(ValueError, match="pixels must be uint8"):
        depth_model.predict(pixels.astype(np.float32))
    with pytest.raises(ValueError, match=r"nothing\.jpg: No such file"):
        depth_model.predict(tmp_path / "nothing.jpg")
    relative = DepthModel("test_resnet", head="fusion", image_size=(48, 64))
    with pytest.raises(ValueError, match="head fusion gives no metres: calibrate"):
        relative.predict(pixels)


@pytest.mark.parametrize(
    ("image", "wanted", "expected"),
    [
        ((480, 640), (144, 192), (144, 192)),
        ((481, 640), (144, 192), (144, 192)),
        ((640, 480), (144, 192), (192, 144)),
        ((1080, 1920), (144, 192), (108, 192)),
        ((10, 10000), (144, 192), (1, 192)),
        ((1, 1), (144, 192), (192, 192)),
    ],
)
def test_proportions_are_kept(
    image: tuple[int, int], wanted: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fitted_size(image, wanted) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{tmp}/*.tif"], "no image and no video fits"),
        (["--camera", "lens"], "camera 'lens' is neither nyu"),
        (["--camera", "500"], "field of view is between 1 and 170"),
        (["--formats", "[ply,stl]"], "formats"),
        (["--input", "{tmp}/nothing.jpg"], "there is no image, video, folder or list at"),
        (["--input", "{tmp}/empty"], "no image in"),
        (["--model", "{tmp}"], "is not a depth model"),
        (["--colour_far", "0"], "colour_near must be"),
        (["--output", "{tmp}/x.png"], "x.png is a file: choose another --output"),
        (["--output", "{tmp}/x.png/deep"], "x.png is a file: choose another --output"),
    ],
)
def test_user_errors_are_sentences(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    photo(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        run(model, tmp_path / "x.png", tmp_path / "out", *given)
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("size", [(1, 1), (40, 50), (1, 300)])
def test_the_picture_of_a_small_image_is_enlarged(tmp_path: Path, size: tuple[int, int]) -> None:
    figure = depth_map(np.full(size, 2.0, np.float32), 0.0, 10.0, "a name " * 40)
    with Image.open(save_figure(figure, tmp_path / "colour.png")) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    colour = np.array(colourise(np.full((1, 1), 2.0), 0.0, 10.0)[0, 0], int)
    rows, columns = np.nonzero(np.abs(pixels[:, :-90] - colour).max(2) <= 2)
    assert np.ptp(columns) >= 390
    assert np.ptp(rows) >= (390 * size[0] // size[1] if min(size) > 1 or size == (1, 1) else 8)


def test_long_names_lose_their_middle() -> None:
    assert shortened("room.jpg", 3.0, 9) == "room.jpg"
    short = shortened("a" * 100 + "_0017.jpg", 3.0, 9)
    assert len(short) <= 40
    assert short.startswith("aaa")
    assert short.endswith("_0017.jpg")


def test_predictions_of_an_earlier_run_stay_in_the_record(model: Path, tmp_path: Path) -> None:
    """A second run into the folder must not forget with which range and camera the first one's files were written."""
    for name in ("a.png", "b.png"):
        photo(tmp_path / name, 30, 40)
    for name, more in (
        ("a.png", ["--formats", "[npy,ply]", "--camera", "60"]),
        ("b.png", ["--formats", "[png]", "--png_scale", "0.01"]),
        ("a.png", ["--formats", "[npy]"]),  # the point cloud of the first run is still there
        ("b.png", ["--formats", "[png]"]),  # all of the second run is written anew
    ):
        assert run(model, tmp_path / name, tmp_path / "out", *more) == 0
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    told = [(one["formats"], one["predicted"][0]["output"]) for one in (report, *report["earlier"])]
    assert told == [(["png"], "b"), (["npy"], "a"), (["npy", "ply"], "a")]
    assert report["earlier"][-1]["predicted"][0]["camera"]["assumed"] is False
    assert not any("earlier" in one for one in report["earlier"])


def test_a_record_that_is_none_of_ours_does_not_stop_prediction(model: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.png", 30, 40)
    (tmp_path / "out").mkdir()
    for text in ("[1]", "{", '{"predicted": 3}'):
        (tmp_path / "out" / "predictions.json").write_text(text)
        assert run(model, tmp_path / "a.png", tmp_path / "out", "--formats", "[npy]") == 0
        assert json.loads((tmp_path / "out" / "predictions.json").read_text())["earlier"] == []


def test_a_camera_in_millimetres_gets_a_sentence(model, tmp_path, capsys) -> None:
    source = photo(tmp_path / "x.png")
    camera = {"fx": 4.2, "fy": 4.2, "cx": 20, "cy": 15, "width": 40, "height": 30}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    options = ("--formats", "ply", "--camera", str(tmp_path / "camera.json"))
    assert run(model, source, tmp_path / "out", *options) == 0
    assert "are these in millimetres?" in " ".join(capsys.readouterr().out.split())


def test_colours_of_two_images_are_their_own_unless_fixed(model, tmp_path) -> None:
    for number, name in enumerate(("a", "b")):
        photo(tmp_path / "photos" / f"{name}.png", seed=number)
    for options in ((), ("--colour_near", "1")):
        assert run(model, tmp_path / "photos", tmp_path / "out", "--formats", "side", *options) == 0
        report = json.loads((tmp_path / "out" / "predictions.json").read_text())
        ends = [entry["colours_m"] for entry in report["predicted"]]
        assert (ends[0] != ends[1]) == (not options)
        assert not options or ends[0] == [1.0, 10.0]
