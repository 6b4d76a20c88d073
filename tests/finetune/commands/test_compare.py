"""Bootstrap intervals against SciPy's, and finetune/commands/compare.py."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_rel

from finetune.commands.compare import main
from finetune.commands.work.compare import compare
from finetune.protocols import Protocol
from finetune.protocols.metrics import METRICS
from finetune.scoring.evaluators import evaluator_of
from finetune.scoring.intervals import draws, resampled, with_intervals
from finetune.scoring.metrics import depth_errors, write_results
from tests.finetune.scoring.test_protocols import sample

SMALL = Protocol("small", "a test", 1e-3, 10.0)
GENERATOR = np.random.default_rng(5)
TRUTHS = GENERATOR.uniform(1, 9, (30, 4, 5)).astype(np.float32)
NOISE = GENERATOR.normal(1, 0.2, (30, 1, 1)) * GENERATOR.normal(1, 0.1, (30, 4, 5))


def scored(factor: float, protocol: Protocol = SMALL) -> dict:
    evaluator = evaluator_of(protocol)
    for number, (truth, noise) in enumerate(zip(TRUTHS, NOISE, strict=True)):
        evaluator.add(sample(f"image {number}", truth), truth * noise * factor)
    return with_intervals(evaluator.results())


def test_intervals_are_those_of_scipy():
    results = scored(1.1)
    for name in METRICS:
        values = [row[name] for row in results["per_image"]]
        theirs = bootstrap(
            (values,), np.mean, n_resamples=4000, method="percentile", rng=1
        ).confidence_interval
        width = theirs.high - theirs.low
        np.testing.assert_allclose(results["intervals"][name], theirs, atol=0.1 * width)
        assert results["intervals"][name][0] <= results["metrics"][name] <= results["intervals"][name][1]
    assert scored(1.1)["intervals"] == results["intervals"]  # seeded


def test_pooled_metrics_are_measured_again_from_all_pixels_of_the_draw():
    results = scored(1.1, replace(SMALL, aggregation="pooled"))
    counts = draws(30, resamples=3)
    again = resampled(results, counts)
    for number, count in enumerate(counts):
        chosen = np.repeat(np.arange(30), count)
        pixels = depth_errors((TRUTHS * NOISE * 1.1).clip(1e-3, 10)[chosen], TRUTHS[chosen])
        for name in METRICS:
            assert again[name][number] == pytest.approx(pixels[name], rel=1e-9)


def test_one_image_has_no_interval():
    evaluator = evaluator_of(SMALL)
    evaluator.add(sample("only", TRUTHS[0]), TRUTHS[0] * 1.1)
    assert set(with_intervals(evaluator.results())["intervals"].values()) == {None}


def test_a_comparison_is_paired():
    """Both errors vary over images far more than they differ: only pairs tell them apart."""
    rows = {row["metric"]: row for row in compare(scored(1.0), scored(1.03))}
    row = rows["log10"]
    assert row["difference"] == pytest.approx(row["other_value"] - row["base_value"])
    assert row["images"] == 30
    assert row["low"] < row["difference"] < row["high"]
    before, after = ([r["log10"] for r in scored(f)["per_image"]] for f in (1.0, 1.03))
    student = ttest_rel(after, before).confidence_interval()  # another way to the same question
    assert row["high"] - row["low"] == pytest.approx(student.high - student.low, rel=0.2)
    assert row["images_better"] == sum(b < a for a, b in zip(before, after, strict=True))
    worse = {row["metric"]: row for row in compare(scored(1.0), scored(1.6))}
    assert worse["abs_rel"]["low"] > 0
    assert worse["abs_rel"]["wilcoxon_p"] < 1e-3
    assert worse["delta1"]["images_better"] < worse["delta1"]["images_worse"]
    same = compare(scored(1.0), scored(1.0))[0]
    assert (same["difference"], same["low"], same["high"], same["wilcoxon_p"], same["sign_p"]) == (
        0,
        0,
        0,
        1,
        1,
    )


def files(folder: Path, *results: dict) -> list[str]:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, one in zip(paths, results, strict=True):
        write_results(path, one)
    return [str(path) for path in paths]


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shuffled = scored(1.6)
    shuffled["per_image"].reverse()
    several = {"protocols": [shuffled, scored(1.0, replace(SMALL, name="other"))]}
    paths = files(tmp_path, {**scored(1.0), "white_border": "keep"}, several)
    main([*paths, "--protocol", "small", "--output", str(tmp_path / "out.csv")])
    said = capsys.readouterr().out
    assert "protocol small, 30 images" in said
    assert "RMSE m↓" in said
    assert "AbsRel more: image" in said
    assert max(map(len, said.splitlines()[2:14])) <= 80
    assert "…" not in said
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == list(METRICS)
    assert float(rows[3]["other_value"]) == several["protocols"][0]["metrics"]["abs_rel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r.update(protocol_hash="x", settings={**r["settings"], "max_depth": 80.0}),
            "differ in max_depth",
        ),
        (lambda r: r["per_image"].pop(), "1 are in one of them only, the first is image 29"),
        (lambda r: r.pop("protocol_hash"), "lacks protocol_hash: score again"),
        (lambda r: r["settings"].update(family="new"), "update this project"),
        (lambda r: r.update(ground_truth="filled"), "against raw depth and"),
        (lambda r: r.update(polarity="closer"), "was scored with data.polarity farther and"),
        (lambda r: r.update(protocol="smell"), "holds results of smell, not of small (did you mean smell?)"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, change, message):
    other = json.loads(json.dumps(scored(1.1)))
    change(other)
    base = {**scored(1.0), "ground_truth": "raw", "polarity": "farther"}
    paths = files(tmp_path, base, other)
    with pytest.raises(SystemExit, match="2"):
        main([*paths, "--protocol", "small"])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    assert "holds no results" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "list.json"), str(tmp_path / "list.json")])
    assert "list.json holds no results" in capsys.readouterr().err


def test_other_readings_of_the_white_border_are_refused(tmp_path, capsys):
    paths = files(tmp_path, {**scored(1.0), "white_border": "keep"}, {**scored(1.2), "white_border": "fill"})
    with pytest.raises(SystemExit):
        main(paths)
    assert "was scored with data.white_border keep and" in capsys.readouterr().err
