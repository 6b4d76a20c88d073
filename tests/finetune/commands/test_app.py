"""The page: what it computes, what it refuses, and all of it in a real browser, once."""

import json
import os
import re
import shutil
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from PIL import Image

from finetune import DepthModel
from finetune.commands import app as entry
from finetune.commands.work import app
from finetune.model.calibration import Calibration
from finetune.model.prediction import predict_image
from finetune.predicting.camera import from_view
from spark.images.decode import read_image

SIZE = (60, 80)


@pytest.fixture(scope="module")
def model() -> DepthModel:
    return DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 4), image_size=(48, 64)).eval()


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / "my room <1>.png"
    Image.fromarray(pixels.repeat(10, 0).repeat(10, 1)).save(path)
    return path


@pytest.fixture
def session(tmp_path) -> app.Session:
    predicted = np.linspace(1, 5, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    image = np.full((*SIZE, 3), 90, np.uint8)
    folder = tempfile.TemporaryDirectory(dir=tmp_path)
    return app.Session("a room.jpg", image, predicted, from_view(60, SIZE), folder)


def test_a_photo_is_deleted_when_it_is_read(model, photo, tmp_path):
    expected = predict_image(model, np.asarray(read_image(photo)))
    opened = app.open_photo(model, str(photo), 10_000, str(tmp_path))
    np.testing.assert_array_equal(opened.predicted, expected)
    assert not photo.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no image", "cannot be read"), (None, "more than max_pixels = 100")],
)
def test_what_cannot_be_read_is_said_and_deleted_too(model, photo, tmp_path, content, words):
    if content:
        photo.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        app.open_photo(model, str(photo), 100, str(tmp_path))
    assert not photo.exists()


def test_points_calibrate_by_a_scale(model, session):
    first = app.add_point(app.pick(session, 10, 20), 2 * float(session.predicted[20, 10]))
    second = app.add_point(app.pick(first, 70, 50), 2 * float(session.predicted[50, 70]))
    done = app.calibrate(second, model, "scale")
    np.testing.assert_allclose(done.depth, 2 * session.predicted, rtol=1e-5)
    shifted = app.add_point(app.pick(session, 10, 20), float(session.predicted[20, 10]) + 0.5)
    shifted = app.add_point(app.pick(shifted, 70, 50), float(session.predicted[50, 70]) + 0.5)
    done = app.calibrate(shifted, model, "scale and shift")
    np.testing.assert_allclose(done.depth, session.predicted + 0.5, rtol=1e-3)
    said = app.words(done, "runs/x/model")
    assert f"--points '10,20,{shifted.points[0].metres:.9g}; 70,50,{shifted.points[1].metres:.9g}'" in said
    assert "--space depth --fit scale_shift" in said
    again = app.add_point(app.pick(shifted, 10, 20), 4.0)  # the same pixel: its distance is corrected
    assert [(p.x, p.metres) for p in again.points] == [(70, shifted.points[1].metres), (10, 4.0)]


def test_the_command_fits_what_the_page_fitted(session):
    power = Calibration("log_depth", 1.0, np.log(2.0), 1e-3, 20.0)  # a factor of two: its shift is not 0
    done = app.replace(session, fitted=(app.Point(1, 1, 2.0),), calibration=power)
    assert "--space log_depth --fit scale --output" in app.words(done, "m")
    both = app.replace(done, fit="scale_shift")
    assert "--space log_depth --fit scale_shift --output" in app.words(both, "m")


def test_the_command_names_the_points_that_were_fitted(model, session):
    done = app.calibrate(app.add_point(app.pick(session, 10, 20), 3.0), model, "scale")
    assert "have changed" not in app.words(done, "m")
    more = app.words(app.add_point(app.pick(done, 40, 30), 3.0), "m")
    assert "--points 10,20,3 " in more
    assert "1 points of" in more
    assert "have changed since" in more


def test_a_calibrated_model_is_calibrated_anew_as_the_tool_does_it(model, photo, tmp_path):
    """Shown under its own calibration, fitted without it: finetune/commands/calibrate.py replaces one too."""
    raw = predict_image(model, np.asarray(read_image(photo)))
    own = Calibration("depth", 2.0, 0.5, 1e-3, 30.0, "a tape measure")
    opened = app.open_photo(model, str(photo), 10_000, str(tmp_path), own)
    np.testing.assert_allclose(opened.depth, 2 * raw + 0.5, rtol=1e-5)
    assert "own calibration: `calibrated, 2 d + 0.5 m: a tape measure`" in app.words(opened, "m")
    known = 3 * float(raw[20, 10])
    done = app.calibrate(app.add_point(app.pick(opened, 10, 20), known), model, "scale")
    np.testing.assert_allclose(done.depth, (3 * raw).clip(1e-3, 30.0), rtol=1e-5)
    assert "takes the place of the model's own calibration" in app.words(done, "m")


def test_relative_depth_under_a_calibration_is_fitted_in_inverse_depth(model, session):
    own = Calibration("disparity", 0.5, 0.1, 1e-3, 50.0)
    relative = app.replace(session, own=own, relative=True)
    np.testing.assert_allclose(relative.depth, 1 / (0.5 * session.predicted + 0.1), rtol=1e-5)
    for x, y in ((10, 5), (70, 50)):  # 1 / (0.2 x + 0.3) everywhere
        known = 1 / (0.2 * float(session.predicted[y, x]) + 0.3)
        relative = app.add_point(app.pick(relative, x, y), known)
    done = app.calibrate(relative, model, "scale and shift of inverse depth")
    np.testing.assert_allclose(done.depth, 1 / (0.2 * session.predicted + 0.3), rtol=1e-3)


def test_depth_is_calibrated_before_it_is_resized_as_in_prediction(session):
    """Between 1 m and 5 m: in inverse depth the other order differs by 0.4 m in between."""
    seen = np.array([[1.0, 5.0], [1.0, 5.0]], np.float32)
    own = Calibration("disparity", 0.5, 0.1, 1e-3, 50.0)
    done = app.replace(session, seen=seen, own=own)
    expected = cv2.resize(1 / (0.5 / seen + 0.1), SIZE[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(done.depth, expected, rtol=1e-4)
    other = 1 / (0.5 / done.predicted + 0.1)
    assert np.abs(other - expected).max() > 0.4


def test_what_a_killed_program_left_is_deleted_and_nothing_else(tmp_path):
    made = {name: tmp_path / f"{app.FOLDER}{name}" for name in ("own", "killed", "running", "begun")}
    for folder in made.values():
        folder.mkdir()
    (made["killed"] / "room_depth.npy").write_bytes(b"x")
    (tmp_path / "else").mkdir()
    (tmp_path / f"{app.FOLDER}link").symlink_to(tmp_path / "else")
    with app.FileLock(made["own"] / app.LOCK), app.FileLock(made["running"] / app.LOCK):
        now = made["own"].stat().st_mtime
        for folder in (made["killed"], made["running"], tmp_path / "else"):
            os.utime(folder, (now - 3600, now - 3600))
        app.forget_killed(made["own"])
    left = {path.name.removeprefix(app.FOLDER) for path in tmp_path.iterdir()}
    assert left == {"own", "running", "begun", "else", "link"}


def test_mistakes_are_sentences(model, session):
    for x, y in ((-1, 0), (80, 0), (0, 60), (0.5, 1), ("1", 1), (None, None)):
        with pytest.raises(ValueError, match="has no pixel at"):
            app.pick(session, x, y)
    with pytest.raises(ValueError, match="click on the photo first"):
        app.add_point(session, 2.0)
    for metres in (None, 0, -1, float("nan"), 1e9):
        with pytest.raises(ValueError, match="number of metres above 0"):
            app.add_point(app.pick(session, 1, 1), metres)
    with pytest.raises(ValueError, match="no known distance yet"):
        app.calibrate(session, model, "scale")
    one = app.add_point(app.pick(session, 1, 1), 2.0)
    with pytest.raises(ValueError, match="two known distances"):
        app.calibrate(one, model, "scale and shift")


def test_files_hold_what_is_shown(session):
    np.testing.assert_array_equal(np.load(app.file_of(session, "npy")), session.predicted)
    with Image.open(app.file_of(session, "png")) as picture:
        np.testing.assert_allclose(np.asarray(picture) / 1000, session.predicted, atol=0.000501)
    cloud = Path(app.file_of(session, "ply")).read_bytes()
    assert cloud.startswith(b"ply\n")
    assert f"element vertex {SIZE[0] * SIZE[1]}\n".encode() in cloud
    assert Path(app.file_of(session, "npy")).name == "a_room_depth.npy"
    session.folder.cleanup()
    assert not Path(session.folder.name).exists()


def test_names_are_no_markup(session):
    evil = app.replace(session, name="`<img src=x>`", points=(app.Point(1, 1, 2.0),))
    done = app.calibrate(evil, DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 4)), "scale")
    outside = re.sub(r"`[^`]*`", "", app.words(done, "m"))
    assert "<img" not in outside


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("a.b", True)],
)
def test_other_machines_are_warned_of(host, warned):
    assert bool(app.check_host(host)) == warned


@pytest.mark.parametrize(
    ("called", "host", "names", "known"),
    [
        ("127.0.0.1:7860", "127.0.0.1", (), True),
        ("localhost:7860", "127.0.0.1", (), True),
        ("LOCALHOST.", "127.0.0.1", (), True),
        ("[::1]:7860", "127.0.0.1", (), True),
        ("evil.example:7860", "127.0.0.1", (), False),
        ("127.0.0.1.evil.example", "127.0.0.1", (), False),
        ("localhost.evil.example", "127.0.0.1", (), False),
        ("192.168.1.5:7860", "127.0.0.1", (), False),
        ("192.168.1.5:7860", "0.0.0.0", (), True),
        ("evil.example", "0.0.0.0", (), False),
        ("studio:7860", "0.0.0.0", ("Studio",), True),
        ("a.b", "a.b", (), True),
        ("[::1", "127.0.0.1", (), False),
        ("", "127.0.0.1", (), False),
    ],
)
def test_only_known_host_names_are_answered(called, host, names, known):
    assert app.is_known_host(called, host, names) == known


def test_a_rebound_name_gets_no_page(address):
    def ask(name: str):
        request = urllib.request.Request(address, headers={"Host": name})
        return urllib.request.urlopen(request)

    with ask("localhost") as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask("evil.example")
    assert refused.value.code == 421
    assert "--host_names" in refused.value.read().decode()


def test_an_empty_page_says_what_to_do():
    assert "Drop a photo above, or click there to choose one" in app.words(None, "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--model", "nowhere"], "is not a depth model"), (["--model", "x", "--max_megabytes", "0"], "above 0")],
)
def test_wrong_options_are_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        entry.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


@pytest.fixture
def address(model, tmp_path, monkeypatch):
    """The page, served."""
    pytest.importorskip("gradio", reason="gradio is not installed (extra: app)")
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = app.build(model, "runs/x/model", 100_000, str(folder))
    yield app.launch(page, "127.0.0.1", None, 1.0)
    page.close()


@pytest.fixture
def browser():
    """Headless Chromium of the system."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "window-size=1200,1100",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=paths[1]))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.mark.timeout(900)  # where the machine is busy, starting a server and a browser takes its time
def test_the_page_in_a_browser(address, browser, model, photo, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector: str):
        return WebDriverWait(browser, 120).until(
            lambda b: next((e for e in b.find_elements(By.CSS_SELECTOR, selector)), None)
        )

    def until(selector: str, pattern: str) -> str:
        seen = lambda b: re.search(pattern, find(selector).text)  # noqa: E731
        return WebDriverWait(browser, 120).until(seen)[0]

    def point_at(x: int, y: int) -> ActionChains:
        pane = find("#viewer .pane")
        box = pane.size
        across, down = (x + 0.5) / 80 * box["width"], (y + 0.5) / 60 * box["height"]
        return ActionChains(browser).move_to_element_with_offset(
            pane, round(across - box["width"] / 2), round(down - box["height"] / 2)
        )

    expected = predict_image(model, np.asarray(read_image(photo)))
    browser.get(address)
    find("input[type=file]").send_keys(str(photo))
    until("#words", r"Depth from \d")
    WebDriverWait(browser, 60).until(
        lambda b: b.execute_script("return document.querySelector('#viewer .colours').naturalWidth") == 80
    )

    point_at(20, 30).perform()  # reading under the pointer
    until("#viewer .reading", rf"{expected[30, 20]:.2f} m at column 20, row 30")
    for x, y in ((20, 30), (60, 10)):  # twice as far, both
        point_at(x, y).click().perform()
        until("#viewer .mark.chosen", rf"{expected[y, x]:.2f} m\?")
        known = round(2 * float(expected[y, x]), 3)
        find("#metres input").send_keys(f"{known}\t")
        find("#add").click()
        until("#viewer .marks", rf"{known:g} m")
        WebDriverWait(browser, 60).until(lambda b: find("#metres input").get_attribute("value") == "")
    point_at(20, 30).perform()
    until("#viewer .reading", rf"{expected[30, 20]:.2f} m at column 20, row 30")
    browser.execute_script("document.querySelector('#calibrate').click()")  # the pointer stays where it is
    until("#words", "calibrated")
    until("#viewer .reading", rf"{2 * expected[30, 20]:.2f} m at column 20, row 30")
    browser.save_screenshot(str(tmp_path / "page.png"))

    find("#npy").click()
    link = find("#download a[href*='depth.npy']").get_attribute("href")
    with urllib.request.urlopen(link) as answer:
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        (tmp_path / "depth.npy").write_bytes(answer.read())
    np.testing.assert_allclose(np.load(tmp_path / "depth.npy"), 2 * expected, rtol=1e-3)
    find("#clear").click()  # a file of other metres than the page shows is not offered
    WebDriverWait(browser, 60).until(lambda b: not b.find_elements(By.CSS_SELECTOR, "#download a"))

    (tmp_path / "text.png").write_text("no image")
    shown_problem = "return document.querySelector('#problem textarea')?.value ?? ''"
    find("#add").click()  # without a point
    WebDriverWait(browser, 60).until(lambda b: "click on the photo first" in b.execute_script(shown_problem))
    find("input[type=file]").send_keys(str(tmp_path / "text.png"))
    WebDriverWait(browser, 60).until(lambda b: "text.png cannot be read" in b.execute_script(shown_problem))
    assert "click on the photo first" not in browser.execute_script(shown_problem)  # one at a time

    kept = [p for p in (tmp_path / "page").rglob("*") if p.is_file() and p.suffix == ".png"]
    assert kept == []  # the photo and the other file are gone; the folder goes with the program
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
