"""Pages about runs: what they show, what they say where something is missing or damaged, and that nothing escapes."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from finetune.commands import report
from finetune.protocols.metrics import METRICS
from finetune.report import DEPTH, depth_page
from finetune.report.results import difference, paired_interval, worst_table
from spark.commands import report as pretraining_report
from spark.report import pretraining_page, read_run
from spark.report.charts import Line, draw, number, running_mean, thinned, ticks
from spark.report.pretraining import panel_caption, task
from spark.report.runs import Run, Series
from spark.training.environment import record_environment


class Page(HTMLParser):
    """Checks that tags close in order, and collects text, images and drawings."""

    VOID = frozenset({"meta", "img", "br"})
    DRAWN = frozenset({"path", "polyline", "circle"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images: list[str] = []
        self.charts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert tag != "script"
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            self.images.append(attributes["src"])
            assert attributes["alt"]
        if tag == "svg":
            self.charts.append(attributes["aria-label"].removesuffix(" over optimizer steps"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.DRAWN

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
    settings = {
        "aggregation": "per_image",
        "flip_average": False,
        "description": "A protocol.",
        "crop": [1, 2],
    }
    return {
        "protocol": "nyu-bts",
        "images": len(rows),
        "metrics": {name: float(np.mean([row[name] for row in rows])) for name in METRICS},
        "per_image": rows,
        "settings": settings,
        "skipped": [],
        "nonfinite_images": 0,
        **changes,
    }


def make_run(
    folder: Path, config: dict, results: dict | None = None, figures: int = 1, steps: int = 40
) -> Path:
    """A run folder as the training scripts leave it."""
    (folder / "figures").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": step, "loss": 1.0 / step, "lr": 1e-3 / step, "images_per_second": 12.5, "layout": "packed"}
        for step in range(1, steps + 1, 3)
    ]
    rows[-1] = {**rows[-1], "step": steps, "val_abs_rel": 0.2, "loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for position in range(figures):
        shade = np.full((30, 90, 3), 60 * position, np.uint8)
        Image.fromarray(shade).save(folder / "figures" / f"panels_{100 * (position + 1):07d}.png")
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def pretrain_config(**model) -> dict:
    return {"model": {"name": "resnet10t", "input_size": [96, 128], "mask_ratio": 0.6, **model}, "seed": 3}


def depth_config(**changes) -> dict:
    return {"encoder": "resnet10t", "data": {"root": "rooms"}, "seed": 0, "output_dir": "x", **changes}


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    spark = depth_config(encoder="pretrain/encoder")
    return {
        "pretrain": make_run(tmp_path / "pretrain", pretrain_config(), figures=3),
        "scratch": make_run(tmp_path / "scratch", depth_config(), scores(1)),
        "spark": make_run(tmp_path / "spark", spark, scores(2, 0.05)),
    }


def write(tmp_path: Path, *arguments: str | Path) -> str:
    output = tmp_path / "page" / "report.html"
    report.main([*map(str, arguments), "--output", str(output)])
    return output.read_text(encoding="utf-8")


def cells_of(page: str, label: str) -> list[str]:
    """Classes of the cells in the row of the results that has a label at its head."""
    row = re.search(rf"<tr><th>{label}</th>(.*?)</tr>", page.split("<h2>Results")[1])
    assert row is not None
    return re.findall(r"<td(?: class=\"(\w+)\")?>", row[1])


def test_the_page_is_whole_and_needs_nothing_from_outside(runs, tmp_path):
    steps = [{"name": "pretrain", "command": "python x.py --x '<1>'", "seconds": 61.2, "cpu_seconds": 100}]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    named = [f"scratch={runs['scratch']}", f"SparK={runs['spark']}", f"pretraining={runs['pretrain']}"]
    extra = ["--steps", tmp_path / "steps.json", "--title", "Rooms & depth", "--lead", "Small."]
    text = write(tmp_path, *named, *extra)
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", src) for src in page.images)
    assert len(page.images) == 2 + 2  # first and last panels; a picture of each label
    assert {"Training loss", "Validation AbsRel↓", "Learning rate", "Images per second", "Loss"} <= set(
        page.charts
    )
    for words in ("Rooms & depth", "Small.", "96 × 128", "60%", "after step 100", "after step 300", "packed"):
        assert words in page.text
    assert "32 images of 8 scenes" in page.text
    assert "python x.py --x '<1>'" in page.text
    assert "0:01:01" in page.text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_run_has_its_own_page(runs):
    report.main([str(runs["spark"])])
    page = Page((runs["spark"] / "report.html").read_text(encoding="utf-8"))
    scored = scores(2, 0.05)
    for name in METRICS:
        assert f"{scored['metrics'][name]:.3f}" in page.text
    worst = max(scored["per_image"], key=lambda row: row["abs_rel"])
    assert page.text.index("Worst images") < page.text.index(worst["name"])
    assert "crop1 × 2" in page.text  # of the protocol's settings
    assert depth_page(runs["spark"]).read_text(encoding="utf-8").count("<section") >= 5
    assert "Reconstructions" in Page(pretraining_page(runs["pretrain"]).read_text(encoding="utf-8")).text


def test_differences_are_to_the_first_label_with_paired_intervals(runs, tmp_path):
    page = write(tmp_path, f"scratch={runs['scratch']}", f"SparK={runs['spark']}")
    assert cells_of(page, "SparK − scratch") == ["", *["better"] * len(METRICS)]  # 0.05 better, noise 0.01
    assert cells_of(page, "SparK") == ["", *["best"] * len(METRICS)]
    other = write(tmp_path, f"SparK={runs['spark']}", f"scratch={runs['scratch']}")
    assert cells_of(other, "scratch − SparK") == ["", *["worse"] * len(METRICS)]
    assert cells_of(other, "scratch") == [""] * (1 + len(METRICS))


def test_an_interval_draws_whole_scenes():
    base, other = scores(1), scores(1)
    # The whole difference sits in one scene of eight: over 32 images it would look certain, over scenes it is not.
    for row in other["per_image"][:4]:
        row["rmse"] -= 0.4
    low, high = paired_interval("rmse", [base], [other])
    assert low < -0.05
    assert high == 0
    assert paired_interval("abs_rel", [base], [scores(1, 0.02)]) == pytest.approx((-0.02, -0.02))


def test_no_interval_where_it_would_mean_nothing():
    few = scores(scenes=3)
    assert paired_interval("rmse", [few], [few]) is None
    pooled = scores(settings={"aggregation": "pooled"})
    assert paired_interval("rmse", [pooled], [pooled]) is None
    cell = difference("rmse", [few], [few])
    assert (cell.text, cell.small, cell.mark) == ("+0.000", "", "")


def test_runs_of_one_label_are_seeds(runs, tmp_path):
    second = make_run(tmp_path / "second", depth_config(seed=1), scores(7))
    page = write(tmp_path, f"scratch={runs['scratch']}", f"scratch={second}", f"SparK={runs['spark']}")
    first, other = (results["metrics"]["rmse"] for results in (scores(1), scores(7)))
    assert f"{(first + other) / 2:.3f}<small>± {abs(first - other) / 2**0.5:.3f}" in page
    assert "scratch, seed 1" in page
    assert "One seed each" not in page


def test_smallness_is_said(runs, tmp_path):
    page = write(tmp_path, runs["scratch"], runs["spark"])
    assert "One seed each" in page
    assert "32 images are few" in page
    full = make_run(tmp_path / "full", depth_config(), scores(scenes=60, views=8))
    assert "are few" not in write(tmp_path, full)
    official = scores(settings={"aggregation": "per_image", "expected_images": 654})
    run = make_run(tmp_path / "official", depth_config(), official)
    assert "official list of this protocol has 654 images" in write(tmp_path, run)


def test_what_differs_between_configurations_is_listed(runs, tmp_path):
    page = write(tmp_path, runs["scratch"], runs["spark"])
    assert "Equal length, 40 optimizer steps" in page
    options = page.split("<th>option</th>")[1].split("</table>")[0]
    assert re.findall(r"<tr><th>([a-z._]+)</th>", options) == ["encoder"]
    longer = make_run(tmp_path / "longer", depth_config(), scores(1), steps=80)
    page = write(tmp_path, runs["scratch"], longer)
    assert "scratch: 40 optimizer steps; longer: 80 optimizer steps; the configurations do not differ" in page


def test_what_is_missing_is_said_in_the_page(tmp_path):
    for name, option in (("bare", "encoder: resnet18"), ("other", "model: {name: resnet18}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(option)
    page = Page(write(tmp_path, tmp_path / "bare", tmp_path / "other"))
    assert page.images == page.charts == []
    assert page.text.count("No loss was logged") == 2
    assert "other has drawn no reconstructions yet" in page.text
    assert "bare has drawn no depth yet" in page.text
    assert "Not scored yet (no results.json or evaluation.json): bare" in page.text


def test_results_that_cannot_be_compared_have_tables_of_their_own(runs, tmp_path):
    for changes in (
        {"protocol": "nyu-bts-scaled"},
        {"settings": {"flip_average": True}},
        {"white_border": "fill"},
        {"ground_truth": "filled"},
        {"per_image": scores(scenes=2)["per_image"], "images": 8},
    ):
        other = make_run(
            tmp_path / f"other{len(list(tmp_path.iterdir()))}", depth_config(), scores(4, **changes)
        )
        page = write(tmp_path, f"scratch={runs['scratch']}", f"other={other}")
        assert "Do not compare numbers of different tables" in page
        assert "other − scratch" not in page
        assert page.count("<th>δ1↑</th><th>δ2↑</th>") == 2


def test_several_protocols_of_a_run_have_a_table_each(tmp_path):
    first, second = scores(1, intervals={"rmse": [0.4, 0.6]}), scores(2, protocol="nyu-affine", missing=["a"])
    run = make_run(tmp_path / "run", depth_config(), {"protocols": [first, second]})
    page = write(tmp_path, run)
    assert page.count("<th>δ1↑</th><th>δ2↑</th>") == 2
    assert f"{second['metrics']['rmse']:.3f}" in page
    assert "1 image without a prediction left out, the first is a." in page
    alone = write(tmp_path, make_run(tmp_path / "alone", depth_config(), first))
    assert "0.400 … 0.600" in alone


def test_damaged_files_are_said_and_the_rest_is_shown(tmp_path, capsys):
    run = make_run(tmp_path / "run", depth_config(), scores(1))
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows[3:3] = [
        "[1, 2]",
        '{"loss": 1}',
        "\x00\x01",
        '{"step": 5, "loss": NaN, "event": "skip", "reason": "<b>"}',
    ]
    (run / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 43, "lo')
    (run / "evaluation.json").write_text("{}")
    (run / "results.json").write_text("{")
    (run / "environment.json").write_text("[3")
    (run / "figures" / "zzz.png").write_bytes(b"no picture")
    page = Page(write(tmp_path, run))
    for words in (
        "metrics.jsonl: 4 lines that are not rows",
        "results.json cannot be read",
        "evaluation.json has not the protocol",
        "environment.json cannot be read",
        "The picture zzz.png cannot be shown",
        "skip<b>",
    ):
        assert words in page.text, words
    assert "loss was NaN or infinite in 1 logged steps, from 5 to 5" in page.text
    assert "Training loss" in page.charts
    assert "results.json cannot be read" in capsys.readouterr().err
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml cannot be read" in Page(write(tmp_path, run)).text


def test_hostile_text_stays_text(tmp_path):
    evil = "</style><script>alert(1)</script><img src=x onerror=alert(1)>"
    results = scores(1, protocol=evil)
    results["per_image"][0]["name"] = f"{evil}/x"
    results["metrics"][evil] = 1.0
    run = make_run(
        tmp_path / "run", depth_config(encoder=evil, model={"head": evil}, **{evil: evil}), results
    )
    (run / "metrics.jsonl").open("a").write(
        json.dumps({"step": 50, "loss": 1, evil: 2, "event": evil}) + "\n"
    )
    (run / "metrics.jsonl").open("a").write(json.dumps({"step": 51, evil: 3}) + "\n")
    for text in (
        write(tmp_path, f"a<script>b={run}", f"c={run}"),
        depth_page(run).read_text(encoding="utf-8"),
    ):
        Page(text)
        assert "<script" not in text
        assert "<img src=x" not in text


def test_no_path_of_this_machine_gets_into_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"root": str(tmp_path / "rooms"), "list": str(Path.home() / "lists" / "a.txt")}
    run = make_run(
        tmp_path / "run", depth_config(data=data), scores(1, model=str(tmp_path / "run" / "model"))
    )
    (tmp_path / "steps.json").write_text(json.dumps([{"command": f"python {tmp_path}/a.py", "seconds": 1}]))
    text = write(tmp_path, run, "--steps", tmp_path / "steps.json")
    assert str(tmp_path) not in text
    assert "~/lists/a.txt" in text
    assert "python a.py" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["a=nowhere"], "there is no folder nowhere"),
        (["."], "is not the folder of a run"),
        (["run", "run"], "several runs are called run"),
        (["a=run", "b=run"], "say where with --output"),
        (["a=run", "a=pre", "--output", "x.html"], "a stands for runs of depth and pretraining"),
        (["run", "--output", "run"], "is a folder: name the file"),
        (["run", "--steps", "none.json"], "there is no file none.json"),
        (["run", "--steps", "run/config.yaml"], "is not a JSON list"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", depth_config())
    make_run(tmp_path / "pre", pretrain_config())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_of_spark_knows_pretraining_runs_only(runs, capsys):
    pretraining_report.main([str(runs["pretrain"])])
    assert (runs["pretrain"] / "report.html").is_file()
    with pytest.raises(SystemExit, match="2"):
        pretraining_report.main([str(runs["spark"])])
    assert "is not a run of pretraining, as its config.yaml shows: spark-report" in capsys.readouterr().err


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
            {"masked_pixels": "zero", "target": "pixels"},
            "hidden patches in the mean colour; the decoder gets its features of the visible ones. "
            "The loss is the mean squared error of the hidden patches, in the standard deviations of the data set.",
        ),
        ({"target": "hog", "loss_on": "all"}, "error of histograms of oriented gradients in all patches."),
    ],
)
def test_ablations_are_described(options, words):
    run = Run("x", Path("x"), {"model": options})
    assert words in task(run)
    caption = panel_caption(Path("panels_0000100.png"), run)
    assert ("histograms of oriented gradients" in caption) == (options.get("target") == "hog")
    assert "after step 100" in caption


def test_a_long_log_is_thinned_without_losing_a_spike(tmp_path):
    values = np.random.default_rng(0).normal(1, 0.1, 20_000)
    values[12_345] = 40.0
    series = Series(np.arange(20_000.0), values)
    few = thinned(series)
    assert len(few.steps) <= 602
    assert few.values.max() == 40.0
    assert few.values.min() == values.min()
    assert (np.diff(few.steps) > 0).all()
    smooth = running_mean(series)
    at = int(smooth.steps[100])
    assert smooth.values[100] == pytest.approx(values[at - 250 : at + 251].mean())
    lines = "".join(json.dumps({"step": n + 1, "loss": v}) + "\n" for n, v in enumerate(values.tolist()))
    run = make_run(tmp_path / "run", pretrain_config())
    (run / "metrics.jsonl").write_text(lines)
    assert read_run(run).steps == 20_000
    assert pretraining_page(run).stat().st_size < 60_000


def test_of_a_step_that_was_repeated_the_last_row_counts(tmp_path):
    run = make_run(tmp_path / "run", pretrain_config())
    rows = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in rows))
    series = read_run(run).series["loss"]
    assert series.steps.tolist() == [1, 2, 3]
    assert series.values.tolist() == [1, 20, 30]


def test_a_loss_that_became_nan_is_not_its_last_finite_value(tmp_path):
    run = make_run(tmp_path / "run", pretrain_config())
    losses = [1.0, float("nan"), 0.5, float("inf"), float("nan")]
    rows = [{"step": s, "loss": loss, "lr": 1e-3} for s, loss in zip((1, 2, 2, 3, 4), losses, strict=True)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_run(run)
    assert read.not_finite == {"loss": [3, 4]}  # step 2 was repeated, and went well
    assert read.series["loss"].values.tolist() == [1.0, 0.5]
    assert np.isnan(read.last("loss"))
    assert read.last("lr") == 1e-3
    page = Page(pretraining_page(run).read_text())
    assert "loss was NaN or infinite in 2 logged steps, from 3 to 4" in page.text
    assert "lossnanlastlogged" in re.sub(r"\s", "", page.text)


def test_scores_from_before_the_last_training_are_named(tmp_path):
    run = make_run(tmp_path / "run", depth_config(), scores(1))
    (run / "evaluation.json").write_text(json.dumps(scores(2)))
    assert DEPTH.read(read_run(run)).problems == []
    written = (run / "evaluation.json").stat().st_mtime
    os.utime(run / "results.json", (written - 3600, written - 3600))
    assert "results.json is older than evaluation.json" in DEPTH.read(read_run(run)).problems[0]


def test_pictures_go_with_the_scores(tmp_path):
    run = make_run(tmp_path / "run", depth_config(), scores(1), figures=0)

    def shown(*names: str) -> list[str]:
        for name in names:
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(run / "figures" / name)
        return re.findall(r"(?:triptychs|worst)\w*[-\w]*\.png", depth_page(run).read_text())

    steps = ["triptychs_step_0000200.png", "worst_step_0000200.png"]
    assert shown("triptychs_step_0000100.png", *steps) == steps
    assert shown("triptychs.png", "worst.png") == ["triptychs.png", "worst.png"]
    assert shown("worst_nyu-bts.png", "worst_nyu-dorn.png") == ["triptychs.png", "worst_nyu-bts.png"]


def test_charts_put_values_where_they_belong():
    drawing = draw([Line("a", Series(np.array([0.0, 50.0, 100.0]), np.array([1.0, 2.0, 3.0])), 2)], steps=100)
    (points, color, style), (left, middle, right) = drawing.paths[0], drawing.dots
    assert (color, style) == (2, "line")
    assert points == " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in drawing.dots)
    assert middle[0] == pytest.approx((left[0] + right[0]) / 2)
    assert left[1] > middle[1] > right[1]  # down is less
    assert left[3] == "a, step 0: 1"
    marks = {text: y for y, text in drawing.y_ticks}
    assert marks["2"] == middle[1]
    logarithmic = draw([Line("a", Series(np.arange(5.0), np.array([1.0, 1.0, 1.0, 1.0, 1e4])), 0)], steps=5)
    assert [text for _, text in logarithmic.y_ticks] == ["1", "10", "100", "1,000", "10,000"]
    assert ticks(0, 460, 5) == [0, 100, 200, 300, 400]
    assert ticks(0.9, 1.13, 5) == [0.9, 0.95, 1.0, 1.05, 1.1]
    assert [number(v) for v in (0, 1234.5, 0.28522, 5e-8, -2.5e9)] == [
        "0",
        "1,234",
        "0.2852",
        "5e-8",
        "-2.5e9",
    ]
    begun = draw([Line("a", Series(np.array([1.0]), np.array([5.0])), 0)], steps=1)
    assert [text for _, text in begun.x_ticks] == ["0", "1"]  # there is no step 0.2
    flat = draw([Line("a", Series(np.array([7.0]), np.array([0.0])), 0)], steps=7)
    assert np.isfinite([flat.dots[0][:2]]).all()


def test_worst_images_are_those_with_the_largest_error():
    table = worst_table(scores(3))
    assert table is not None
    named = {row["name"]: row["abs_rel"] for row in scores(3)["per_image"]}
    assert [row[0].text for row in table.rows] == sorted(named, key=lambda name: -named[name])[:8]
    relations = {
        "per_image": [{"name": "a", "whdr": 0.2}, {"name": "b", "whdr": 0.7}, {"name": "c", "whdr": None}]
    }
    table = worst_table(relations)
    assert table is not None
    assert [row[0].text for row in table.rows] == ["b", "a"]


def test_every_start_of_a_run_is_recorded(tmp_path):
    record_environment(tmp_path, 0, 1)
    record_environment(tmp_path, 20, 2)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["step"], second["step"], second["processes"]) == (0, 20, 2)
    assert first["torch"] == second["torch"]
    record_environment(tmp_path, 0, 1)  # begun anew in the same folder
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    (tmp_path / "config.yaml").write_text("model: {name: resnet18}")
    assert first["torch"] in Page(pretraining_page(tmp_path).read_text()).text
