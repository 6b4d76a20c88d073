"""Benchmarks of depth: nobody is timed who computes something else. No timing is asserted."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tools import benchmark, tables
from tools.benchmarks import depth
from tools.benchmarks.models import count_macs

SIZE = (32, 64)
CARD: dict[str, Any] = {
    "data": {
        "image_size": list(SIZE),
        "crop_size": list(SIZE),
        "border": None,
        "colour": 1.0,
        "zoom": [1.0, 1.0],
    },
    "model": {
        "head": "metric_bins",
        "head_options": {"width": 16, "bins": 8, "embedding": 8, "attractors": [2, 2, 2, 1]},
    },
    "losses": {"silog": 1.0, "segmentation": 0.1},
    "loss_options": {"segmentation": {"classes": 13, "decoder_channels": [16, 8, 8, 8, 8]}},
    "optim": {"batch_size": 2, "clip_grad": 0.1},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of run cards: distil, and plain without the segmentation."""
    folder = tmp_path / "cards"
    folder.mkdir()
    plain = {**CARD, "encoder": "test_resnet", "losses": {"silog": 1.0}, "loss_options": {}}
    for name, card in {"distil": CARD, "plain": plain}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setattr(depth, "CARDS", folder)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_distillation(cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "distillation.csv"
    given = ["--config", "distil", "--encoder", "test_resnet", "--size", "32x64", "64x64", "--batch", "2"]
    benchmark.main(
        ["distillation", *given, "--rounds", "2", "--threads", "1", "--busy", "--csv", str(output)]
    )
    rows = read(output)
    assert [(row["contender"], row["height"], row["width"]) for row in rows] == [
        ("without", "32", "64"),
        ("with", "32", "64"),
        ("without", "64", "64"),
        ("with", "64", "64"),
    ]
    for row in rows:
        assert (row["config"], row["encoder"], row["batch"], row["threads"], row["base"]) == (
            "distil",
            "test_resnet",
            "2",
            "1",
            "without",
        )
        assert float(row["seconds_median"]) > 0
        assert row["torch"] == torch.__version__
    assert rows[0]["cost_median"] == rows[0]["gmacs_cost"] == "1.000"
    # The decoder has two 3x3 convolutions a size and one to classes, each with two like it in the backward pass.
    widths, skips = (16, 16, 8, 8, 8, 8), (16, 16, 16, 16, 0)
    macs = 8 * 13 * 9 * 32 * 64
    for block, (above, skip, width) in enumerate(zip(widths[:-1], skips, widths[1:], strict=True)):
        macs += (above + skip + width) * width * 9 * (32 * 64 // 4 ** (4 - block))
    added = float(rows[1]["gmacs_training"]) - float(rows[0]["gmacs_training"])
    assert added == pytest.approx(3 * macs / 1e9, abs=0.0011)
    ratio = float(rows[1]["gmacs_training"]) / float(rows[0]["gmacs_training"])
    assert float(rows[1]["gmacs_cost"]) == pytest.approx(ratio, abs=0.02)
    said = capsys.readouterr().out
    assert "gmacs_cost" in said


def test_another_model_is_not_timed(cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = depth.build_trained

    def and_spoil(model: Any, config: Any) -> Any:
        if "segmentation" in config.losses:
            model.head.distribution.mlp[0].bias.data.add_(0.5)
        return build(model, config)

    monkeypatch.setattr(depth, "build_trained", and_spoil)
    with pytest.raises(ValueError, match="differs with and without the segmentation loss"):
        depth.distillation_rows("distil", "test_resnet", [SIZE], 2, "fp32", 2)


def test_a_card_without_the_loss_is_refused(cards: Path) -> None:
    with pytest.raises(ValueError, match="card plain has no loss segmentation"):
        depth.distillation_rows("plain", "test_resnet", [SIZE], 2, "fp32", 2)


def test_the_default_cards_are_there() -> None:
    assert depth.CARDS == tables.CARDS
    for card, encoder in {
        "zoedepth_distil": "resnet18",
        "unetpp_nyu_128x160": "resnet18",
        "lraspp_nyu": "mobilenetv3_large_100",
    }.items():
        assert depth.read_card(card, "resnet18", data_root=".").encoder == encoder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["distillation", "--size", "96", "--busy"],
            "--size is HEIGHTxWIDTH in pixels, such as 96x128, not 96",
        ),
        (
            ["distillation", "--config", "nothing", "--busy"],
            "there is no run card nothing: there are ",
        ),
        (["distillation", "--rounds", "1"], "--rounds must be 2 or more"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_scoring(tmp_path: Path) -> None:
    """A turn scores as many images as it says, under each protocol."""
    output = tmp_path / "scoring.csv"
    given = ["--protocol", "nyu-bts", "nyu-laina", "--images", "3", "--size", "48", "64", "--rounds", "2"]
    benchmark.main(["scoring", *given, "--threads", "1", "--busy", "--csv", str(output)])
    rows = read(output)
    assert [(row["contender"], row["images"], row["height"]) for row in rows] == [
        ("nyu-bts", "3", "48"),
        ("nyu-laina", "3", "48"),
    ]
    assert all(float(row["seconds_median"]) > 0 for row in rows)
    assert rows[0]["speedup_median"] == "1.000"


def test_scoring_under_a_protocol_of_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["scoring", "--protocol", "diw", "--busy"])
    assert "diw is not for frames of NYU with depth" in capsys.readouterr().err


def test_counts_of_the_run_cards() -> None:
    """Parameters are the published ones, multiplications those of a convolution."""
    convolution = nn.Conv2d(4, 6, 3, padding=1, device="meta")
    images = torch.empty(1, 4, 10, 20, device="meta")
    assert count_macs(lambda: convolution(images)) == 10 * 20 * 4 * 6 * 9
    assert tables.cost_of(tables.CARDS / "lraspp_nyu.yaml")["parameters_M"] == "3.22"
    distil = tables.cost_of(tables.CARDS / "zoedepth_distil.yaml")
    assert distil["training_only_parameters_M"] == "2.88"
    rows = read(tables.COSTS)
    assert {row["config"] for row in rows} == {card.stem for card in tables.CARDS.glob("*.yaml")}
    assert distil in rows
