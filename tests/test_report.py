"""The HTML report: what it shows, what it says when something is missing, and what it refuses."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from finetune import DepthModel
from finetune.metrics import METRICS
from spark import SparK
from spark.assembly import build_model
from spark.config import ModelConfig
from tests.depth_world import make_depth_world
from tools import report


class Page(HTMLParser):
    """Checks that tags close in order, and collects text and images."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
            assert dict(attrs)["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def scores(seed: int = 0, better: float = 0.0, scenes: int = 8, views: int = 4, **changes) -> dict:
    """What evaluate.py writes, for images of several scenes."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "name": f"room_{scene}/rgb_{view}.jpg",
            **{m: 0.5 + 0.1 * scene / scenes + rng.normal(0, 0.01) for m in METRICS},
            "pixels": 100,
        }
        for scene in range(scenes)
        for view in range(views)
    ]
    for row in rows:
        for name in METRICS:
            row[name] += better if name.startswith("delta") else -better
    metrics = {name: float(np.mean([row[name] for row in rows])) for name in METRICS}
    settings = {
        "aggregation": "per_image",
        "flip_average": False,
        "description": "A protocol.",
        "expected_images": None,
    }
    result = {
        "protocol": "nyu-bts",
        "images": len(rows),
        "metrics": metrics,
        "per_image": rows,
        "settings": settings,
    }
    return {**result, "skipped": [], "nonfinite_images": 0, **changes}


def make_run(
    folder: Path, config: dict, *, results: dict | None = None, figures: int = 1, steps: int = 40
) -> Path:
    """A run folder as the training scripts leave it."""
    (folder / "figures").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": step, "loss": 1.0 / step, "lr": 1e-3, "images_per_second": 12.5}
        for step in range(1, steps + 1, 3)
    ]
    rows[-1] = {**rows[-1], "step": steps, "val_abs_rel": 0.2, "loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(figures):
        shade = np.full((30, 90, 3), 60 * number, np.uint8)
        Image.fromarray(shade).save(folder / "figures" / f"panels_{100 * (number + 1):07d}.png")
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def depth_config(**changes) -> dict:
    return {"encoder": "resnet10t", "data": {"root": "rooms"}, "seed": 0, "output_dir": "x", **changes}


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    pretraining = {"model": {"name": "resnet10t", "input_size": [96, 128], "mask_ratio": 0.6}, "seed": 3}
    return {
        "pretrain": make_run(tmp_path / "pretrain", pretraining, figures=3),
        "scratch": make_run(tmp_path / "scratch", depth_config(), results=scores(1)),
        "spark": make_run(
            tmp_path / "spark", depth_config(encoder="pretrain/encoder"), results=scores(2, 0.05)
        ),
    }


def write(tmp_path: Path, *arguments: str | Path) -> str:
    output = tmp_path / "page" / "report.html"
    assert report.main([*map(str, arguments), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def depth(label: str, folder: Path) -> tuple[str, str]:
    return "--depth", f"{label}={folder}"


def test_the_page_is_whole_and_needs_nothing_from_outside(runs, tmp_path):
    steps = [
        {
            "name": "pretrain",
            "command": "python spark/pretrain.py --x '<1>'",
            "seconds": 61.2,
            "cpu_seconds": 100,
        }
    ]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    text = write(
        tmp_path, "--pretrain", runs["pretrain"], *depth("scratch", runs["scratch"]), *depth("SparK", runs["spark"]),
        "--steps", tmp_path / "steps.json", "--title", "Rooms & depth", "--lead", "Small.",
    )  # fmt: skip
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", src) for src in page.images)
    # loss and lr; first and last panels; loss and validation error; a triptych each
    assert len(page.images) == 2 + 2 + 2 + 2
    for words in (
        "Rooms & depth",
        "Small.",
        "96 × 128",
        "60%",
        "after step 100",
        "after step 300",
        "32 images of 8",
    ):
        assert words in page.text
    assert "python spark/pretrain.py --x '<1>'" in page.text
    assert "0:01:01" in page.text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_differences_are_to_the_first_label_with_paired_intervals(runs, tmp_path):
    text = write(tmp_path, *depth("scratch", runs["scratch"]), *depth("SparK", runs["spark"]))
    assert "SparK − scratch" in text
    row = text.split("SparK − scratch")[1].split("</tr>")[0]
    assert row.count('class="better"') == len(METRICS)  # 0.05 better everywhere, noise 0.01
    other = write(tmp_path, *depth("SparK", runs["spark"]), *depth("scratch", runs["scratch"]))
    row = other.split("scratch − SparK")[1].split("</tr>")[0]
    assert row.count('class="worse"') == len(METRICS)


def test_an_interval_draws_whole_scenes():
    base, other = scores(1), scores(1)
    # The whole difference sits in one scene of eight: over 32 images it would look certain, over scenes it is not.
    for row in other["per_image"][:4]:
        row["rmse"] -= 0.4
    low, high = report.paired_interval("rmse", [base], [other])
    assert low < -0.05
    assert high == 0
    for row in other["per_image"]:
        row["rmse"] = base["per_image"][0]["rmse"]
    low, high = report.paired_interval("abs_rel", [base], [scores(1, 0.02)])
    assert (low, high) == pytest.approx((-0.02, -0.02))


def test_no_interval_where_it_would_mean_nothing():
    few = scores(scenes=3)
    assert report.paired_interval("rmse", [few], [few]) is None
    pooled = scores(settings={"aggregation": "pooled"})
    assert report.paired_interval("rmse", [pooled], [pooled]) is None
    assert report.difference("rmse", [few], [few]) == "+0.000"


def test_runs_of_one_label_are_seeds(runs, tmp_path):
    second = make_run(tmp_path / "second", depth_config(seed=1), results=scores(7))
    page = write(
        tmp_path,
        *depth("scratch", runs["scratch"]),
        *depth("scratch", second),
        *depth("SparK", runs["spark"]),
    )
    table = page.split("<tbody>")[1]
    first, other = (results["metrics"]["rmse"] for results in (scores(1), scores(7)))
    assert f"{(first + other) / 2:.3f}<br>" in table
    assert f"± {abs(first - other) / 2**0.5:.3f}" in table
    assert "One seed each" not in page


def test_smallness_is_said(runs, tmp_path):
    page = write(tmp_path, *depth("scratch", runs["scratch"]))
    assert "One seed each" in page
    assert "32 images are few" in page
    full = make_run(tmp_path / "full", depth_config(), results=scores(scenes=60, views=8))
    assert "are few" not in write(tmp_path, *depth("full", full))
    official = scores(settings={"aggregation": "per_image", "expected_images": 654})
    run = make_run(tmp_path / "official", depth_config(), results=official)
    assert "stand on 654 images" in write(tmp_path, *depth("a", run))


def test_what_differs_between_configurations_is_listed(runs, tmp_path):
    page = write(tmp_path, *depth("scratch", runs["scratch"]), *depth("SparK", runs["spark"]))
    assert "Equal length, 40 optimizer steps" in page
    table = page.split('class="options"')[1].split("<tbody>")[1].split("</table>")[0]
    assert re.findall(r"<th>([a-z._]+)</th>", table) == ["encoder"]
    longer = make_run(tmp_path / "longer", depth_config(), results=scores(1), steps=80)
    page = write(tmp_path, *depth("scratch", runs["scratch"]), *depth("longer", longer))
    assert "scratch: 40 optimizer steps; longer: 80 optimizer steps; the configurations do not differ" in page


def test_what_is_missing_is_said_in_the_page(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("encoder: resnet18\n")
    text = write(tmp_path, "--pretrain", bare, *depth("bare", bare))
    page = Page(text)
    assert page.images == []
    assert page.text.count("No loss was logged") == 2
    assert "has drawn no reconstructions yet" in page.text
    assert "bare has drawn no depth yet" in page.text
    assert "Not scored yet (no results.json or evaluation.json): bare" in page.text


def test_evaluation_of_the_training_run_stands_in_for_results(tmp_path):
    run = make_run(tmp_path / "run", depth_config())
    (run / "evaluation.json").write_text(json.dumps(scores(3)))
    assert "32 images of 8 scenes" in write(tmp_path, *depth("run", run))


def test_labels_and_settings_are_escaped(tmp_path):
    run = make_run(tmp_path / "run", depth_config(encoder="<script>alert(1)</script>"), results=scores(1))
    text = write(tmp_path, *depth("a<b>&", run), *depth("c", run))
    Page(text)
    assert "<script" not in text
    assert "a&lt;b&gt;&amp;" in text


def test_no_path_of_this_machine_gets_into_the_page(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = depth_config(
        data={"root": str(tmp_path / "rooms"), "list": str(Path.home() / "lists" / "a.txt")}
    )
    run = make_run(tmp_path / "run", config, results=scores(1))
    steps = [{"name": "x", "command": f"python {tmp_path}/a.py", "seconds": 1}]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    text = write(tmp_path, *depth("run", run), "--steps", tmp_path / "steps.json")
    assert str(tmp_path) not in text
    assert "~/lists/a.txt" in text
    assert "python a.py" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "nyu-bts-scaled"}, "numbers of two protocols cannot stand in one table"),
        ({"settings": {"flip_average": True}}, "different settings"),
        ({"per_image": scores(scenes=2)["per_image"], "images": 8}, "different images"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(runs, tmp_path, capsys, changes, words):
    other = make_run(tmp_path / "other", depth_config(), results=scores(4, **changes))
    output = tmp_path / "report.html"
    arguments = [*depth("scratch", runs["scratch"]), *depth("other", other), "--output", str(output)]
    assert report.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to report"),
        (["--pretrain", "nowhere"], "there is no folder nowhere"),
        (["--depth", "nowhere"], "LABEL=DIR"),
        (["--depth", "=x"], "LABEL=DIR"),
        (["--pretrain", "."], "is not the folder of a run"),
        (["--pretrain", "run", "--steps", "none.json"], "there is no file none.json"),
        (["--pretrain", "run", "--steps", "run/config.yaml"], "is not a JSON list"),
        (["--pretrain", "run", "--figure", "x.png"], "needs a depth run"),
        (["--pretrain", "run", "--figure_images", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", depth_config())
    assert report.main([*arguments, "--output", "report.html"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")


def test_damaged_files_are_named(tmp_path, capsys):
    for name, content in (("results.json", "{"), ("results.json", "{}"), ("config.yaml", "a: [")):
        run = make_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", depth_config())
        (run / name).write_text(content)
        assert report.main([*depth("x", run), "--output", str(tmp_path / "r.html")]) == 2
        assert str(run / name) in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 3])
def test_the_figure_shows_reconstructions_and_every_label(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    make_depth_world(tmp_path / "rooms", train=1, val=4, size=(48, 64))
    spark = SparK("resnet10t", (64, 96), decoder_width=32)
    pretrain = make_run(
        tmp_path / "pretrain", {"model": {"name": "resnet10t", "input_size": [64, 96], "decoder_width": 32}}
    )
    checkpoint = pretrain / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in spark.state_dict().items()}
    save_file(weights, checkpoint / "model.safetensors")
    torch.save({"step": 1, "optimizer": {}, "extra": {}}, checkpoint / "state.pt")
    data = {"root": "rooms", "list": "nyu_train.txt", "val_list": "nyu_val.txt"}
    config = depth_config(data=data, protocol="nyu-bts-scaled")
    for label in ("scratch", "spark"):
        make_run(tmp_path / label, config, results=scores(1))
        DepthModel("resnet10t", decoder_channels=(16, 16, 8, 8, 4), image_size=(48, 64)).save(
            tmp_path / label / "model"
        )
    figure = tmp_path / "docs" / "demo.png"
    write(
        tmp_path, "--pretrain", pretrain, *depth("scratch", tmp_path / "scratch"), *depth("SparK", tmp_path / "spark"),
        "--figure", figure, "--figure_images", str(count),
    )  # fmt: skip
    with Image.open(figure) as image:
        assert 800 < image.width < 1200
        assert np.asarray(image).std() > 20
    samples = report.validation_samples(report.read_run(tmp_path / "spark", "x"), count)
    assert len(samples) == count
    triples = report.masked_and_reconstructed(
        report.read_run(pretrain, "x"), [sample.image for sample in samples]
    )
    for shown, masked, made in triples:
        assert shown.shape == masked.shape == made.shape == (64, 96, 3)
        hidden = (masked == 128).all(-1)
        assert 0.4 < hidden.mean() < 0.8
        np.testing.assert_array_equal(shown[~hidden], masked[~hidden])
        assert (
            np.abs(made[~hidden].astype(int) - shown[~hidden]).max() <= 1
        )  # visible patches are as they were


def pretrained(folder: Path, **options) -> report.Run:
    """A pretraining run of a tiny model with a whole checkpoint."""
    options = {"name": "test_resnet", "input_size": 64, "decoder_width": 32, **options}
    make_run(folder, {"model": options})
    model = build_model(ModelConfig(**options))
    checkpoint = folder / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint / "model.safetensors")
    torch.save({"step": 1, "optimizer": {}, "extra": {}}, checkpoint / "state.pt")
    return report.read_run(folder, "pretraining")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "sees the visible patches only. The loss is the mean squared error of the hidden patches, each"),
        (
            {"masked_pixels": "token", "decoder_maps": 1, "loss_on": "all"},
            "a learned colour in hidden patches; of its feature maps the decoder gets the deepest one only. "
            "The loss is the mean squared error of all patches, each",
        ),
        (
            {"masked_pixels": "zero", "target": "pixels", "decoder_stages": 4, "densify_kernel": 1},
            "hidden patches in the mean colour; the decoder gets its features of the visible ones. "
            "The loss is the mean squared error of the hidden patches, in the standard deviations of the data set.",
        ),
        ({"in_chans": 1, "stride": 16}, "<dt>channels</dt><dd>1</dd>"),
    ],
)
def test_ablations_and_grey_runs_are_described_and_drawn(tmp_path, options, words):
    run = pretrained(tmp_path / "run", **options)
    assert words in report.pretraining_section(run)
    colour = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    mean = [0.4] if options.get("in_chans") else [0.4] * 3
    run.config["data"] = {"mean": mean, "std": [0.2] * len(mean)}
    ((shown, masked, made),) = report.masked_and_reconstructed(run, [colour])
    assert shown.shape == masked.shape == made.shape == (64, 64, 3)
    seen = ~(masked == 128).all(-1)
    assert np.abs(made[seen].astype(int) - shown[seen]).max() <= 1
    assert ((shown == shown[..., :1]).all()) == ("in_chans" in options)


def test_histograms_have_their_caption_and_other_channels_no_figure(tmp_path):
    page = report.pretraining_section(pretrained(tmp_path / "hog", target="hog", loss_on="all"))
    assert "the mean squared error of histograms of oriented gradients in all patches." in page
    assert "Input, masked input, histograms of oriented gradients, and the same with predicted ones" in page
    with pytest.raises(ValueError, match="was trained on images of 5 channels"):
        report.masked_and_reconstructed(pretrained(tmp_path / "five", in_chans=5), [])


def test_a_long_list_of_images_is_sampled_evenly(tmp_path):
    make_depth_world(tmp_path, train=1, val=9)
    run = report.Run(
        "x", tmp_path, {"data": {"root": str(tmp_path), "val_list": "nyu_val.txt"}}, [], [], None
    )
    names = [sample.name for sample in report.validation_samples(run, 3)]
    assert [re.search(r"(\d+)\.png", name)[1] for name in names] == ["0001", "0004", "0007"]


def test_module_runs_as_a_script(tmp_path):
    path = Path(report.__file__)
    done = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=path.parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "--figure FILE.png" in done.stdout
