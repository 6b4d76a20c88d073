"""The study of decoders: which runs it starts, and that its table says what their files say."""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # as when a tool is run as a script

import decoder_study
import study
from benchmarks.decoders import ORIGINAL_DECODER, Decoder

from spark import SparK


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images" / "scenes").mkdir(parents=True)
    (tmp_path / "data" / "nyu").mkdir()
    (tmp_path / "data" / "nyu" / "nyu_train.txt").write_text("/a/rgb.jpg /a/depth.png 518\n")
    return tmp_path / "data"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Commands, which write the files of a finished run at once; a step of 256/2/1 takes half a second, others two."""
    made: list[dict[str, object]] = []

    def call(script: str, **options: object) -> None:
        made.append({"script": script, **options})
        target = Path(str(options.get("output_dir", options.get("output"))))
        if script in ("spark/pretrain.py", "finetune/depth.py"):
            result = target / ("encoder" if "spark" in script else "model")
            result.mkdir(parents=True)
            (result / "model.safetensors").touch()
            (target / "config.yaml").write_text(f"epochs: {options['epochs']}\n")
            (target / "metrics.jsonl").write_text(
                json.dumps({"epoch": options["epochs"], "loss": 0.75}) + "\n"
            )
        elif script == "spark/commands/probe.py":
            scores = {"knn": {"10": 0.5, "20": 0.6}, "linear": {"val": 0.7}}
            target.write_text(json.dumps({"encoders": [scores]}))
        else:
            metrics = {"delta1": 0.4, "abs_rel": 0.3, "rmse": 1.2, "silog": 25.0}
            target.write_text(json.dumps({"metrics": metrics}))

    def interleaved(steps: dict[str, object], rounds: int, device: str) -> dict[str, list[float]]:
        return {name: [0.5 if name == "256/2/1" else 2.0] * rounds for name in steps}

    for tool in (study, decoder_study):
        monkeypatch.setattr(tool, "call", call)
    monkeypatch.setattr(decoder_study, "interleaved", interleaved)
    monkeypatch.setattr(decoder_study, "training_step", lambda *arguments: None)
    return made


def run(monkeypatch: pytest.MonkeyPatch, data: Path, *arguments: str) -> list[dict[str, str]]:
    out = data.parent
    fixed = ["--data", data, "--output_dir", out / "runs", "--results", out / "table", "--busy"]
    monkeypatch.setattr(sys, "argv", ["decoder_study.py", *map(str, fixed), *arguments])
    decoder_study.main()
    return list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))


def test_runs_and_table(monkeypatch, data, calls):
    choice = [
        "--decoders",
        "768/5/3",
        "256/2/1",
        "--equal_time",
        "256/2/1",
        "--depth",
        "256/2/1",
        "--epochs",
        "3",
    ]
    rows = run(monkeypatch, data, *choice)
    pretrained = [c for c in calls if c["script"] == "spark/pretrain.py"]
    assert [(c["model.decoder_width"], c["epochs"]) for c in pretrained] == [(768, 3), (256, 3), (256, 12)]
    assert pretrained[1]["model.decoder_stages"] == 2
    assert pretrained[1]["model.densify_kernel"] == 1
    assert [c["script"] for c in calls].count("finetune/depth.py") == 2  # equal images, and equal time
    assert [(r["decoder_width"], r["equal"], r["step_speedup"]) for r in rows] == [
        ("768", "images", "1.000"),
        ("256", "images", "4.000"),
        ("256", "time", "4.000"),
    ]
    assert [r["rmse"] for r in rows] == ["", "1.2000", "1.2000"]
    table = (data.parent / "table.md").read_text()
    assert "| 256/2/1 | time | 12 | 4.00x | 60.0 % | 70.0 % | 0.400 | 0.300 | 1.200 |" in table
    assert str(data) not in table

    before = len(calls)
    run(monkeypatch, data, *choice)
    assert len(calls) == before  # finished runs are not run again

    # Another decoder is measured beside the first; what is known, and the epochs that follow from it, stay.
    slower = dict.fromkeys(("768/5/3", "384/3/1", "256/2/1"), 1.0)
    measured = []

    def interleaved(steps: dict[str, object], rounds: int, device: str) -> dict[str, list[float]]:
        measured.append(list(steps))
        return {name: [slower[name]] * rounds for name in steps}

    monkeypatch.setattr(decoder_study, "interleaved", interleaved)
    more = ["--decoders", "768/5/3", "256/2/1", "384/3/1", *choice[3:]]
    assert [r["step_speedup"] for r in run(monkeypatch, data, *more)] == ["1.000", "4.000", "1.000", "4.000"]
    assert measured == [["768/5/3", "384/3/1"]]
    monkeypatch.setattr(decoder_study, "device_name", lambda device: "another")
    rows = run(monkeypatch, data, *choice)
    assert measured[1:] == [["768/5/3", "256/2/1"]]
    assert [(r["step_speedup"], r["epochs"]) for r in rows] == [
        ("1.000", "3.0"),
        ("1.000", "3.0"),
        ("1.000", "12.0"),
    ]


def test_rows_made_elsewhere_stay(monkeypatch, data, calls):
    choice = ["--decoders", "768/5/3", "256/2/1", "--equal_time", "256/2/1", "--epochs", "3"]
    before = run(monkeypatch, data, *choice)
    shutil.rmtree(data.parent / "runs")
    calls.clear()

    more = ["--keep", "--decoders", "768/5/3", "384/3/1", "--epochs", "3"]
    after = run(monkeypatch, data, *more)
    assert [c["model.decoder_width"] for c in calls if c["script"] == "spark/pretrain.py"] == [384]
    assert [(r["decoder_width"], r["equal"]) for r in after] == [
        ("768", "images"),
        ("384", "images"),
        ("256", "images"),
        ("256", "time"),
    ]
    assert [after[0], *after[2:]] == before
    assert "| 256/2/1 | time | 12 | 4.00x |" in (data.parent / "table.md").read_text()

    # Of runs that are there, those that are not asked for stay too; a decoder without stages is read as it was written.
    kept = run(monkeypatch, data, "--keep", "--decoders", "768", "--epochs", "3")
    assert [r["decoder_stages"] for r in kept] == ["", "5", "3", "2", "2"]
    assert run(monkeypatch, data, "--keep", "--decoders", "768", "--epochs", "3") == kept

    for other in (["--epochs", "2"], ["--epochs", "3", "--precision", "bf16"]):
        with pytest.raises(SystemExit, match="a table has one setting"):
            run(monkeypatch, data, "--keep", "--decoders", "768/5/3", *other)
    assert [r["decoder_width"] for r in run(monkeypatch, data, "--decoders", "768/5/3", "--epochs", "3")] == [
        "768"
    ]


def test_wrong_decoders_are_refused(monkeypatch, data, calls, capsys):
    for arguments, said in (
        (["--decoders", "256/4"], "'256/4' is no decoder"),
        (["--depth", "512/5/3"], "512/5/3 is not among --decoders"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, data, *arguments)
        assert said in capsys.readouterr().err
    assert not calls


def test_decoder_reads_what_it_writes():
    for text in ("768", "256/4/1"):
        assert str(Decoder.parse(text)) == text
    assert Decoder.parse("768") == ORIGINAL_DECODER
    for wrong in ("", "a", "256/0/1", "1/2/3/4"):
        with pytest.raises(argparse.ArgumentTypeError, match="WIDTH/STAGES/KERNEL"):
            Decoder.parse(wrong)
    model = SparK("test_resnet", 64, 0.5, **Decoder(32, 2, 1).options)
    assert len(model.decoder.blocks) == 2
