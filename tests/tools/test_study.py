"""tools/study.py: what counts as finished, and the table, on runs that were written by hand."""

import csv
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # as when a tool is run as a script

import study


def run_folder(folder: Path, result: str, epochs: list[float]) -> Path:
    """A run with rows at these epochs, and its result."""
    (folder / result).mkdir(parents=True)
    (folder / result / "model.safetensors").touch()
    rows = [{"step": i, "epoch": epoch} for i, epoch in enumerate(epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_finished_at_its_last_epoch_only(tmp_path):
    run = run_folder(tmp_path / "run", "encoder", [0.5, 5.01])
    assert study.finished(run, "encoder", 5)
    assert not study.finished(run, "encoder", 6)  # the result may have been asked for on the way
    (run / "encoder" / "model.safetensors").unlink()
    assert not study.finished(run, "encoder", 5)
    with pytest.raises(SystemExit, match="continues from here"):
        study.require_finished(run, "encoder", 5)
    assert not study.finished(tmp_path / "none", "encoder", 1)


@pytest.fixture
def options(tmp_path):
    """Of a study of one encoder and two seeds, all of it done: delta1 0.5 and 0.7 with SparK, 0.4 twice without."""
    options = Namespace(
        output_dir=tmp_path / "runs",
        results=tmp_path / "results" / "table",
        encoders=["resnet18"],
        seeds=[0, 1],
        pretrain_epochs=5.0,
        readme=tmp_path / "README.md",
    )
    pretraining = run_folder(study.pretraining_of("resnet18", options), "encoder", [5.0])
    (pretraining / "config.yaml").write_text(yaml.safe_dump({"epochs": 5, "model": {"input_size": 128}}))
    scores = {("spark", 0): 0.5, ("spark", 1): 0.7, ("scratch", 0): 0.4, ("scratch", 1): 0.4}
    for (start, seed), delta1 in scores.items():
        run = run_folder(study.run_of("resnet18", start, seed, options), "model", [15.0])
        config = {"epochs": 15, "data": {"crop_size": [128, 160]}, "precision": "bf16", "model": {}}
        if start == "scratch":
            config["model"] = {"encoder_options": {"zero_init_last": False}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        metrics = dict.fromkeys(study.METRICS, 0.25) | {"delta1": delta1}
        results = {"metrics": metrics, "images": 103, "protocol": "nyu-bts"}
        study.result_of("resnet18", start, seed, options).write_text(json.dumps(results))
    options.readme.write_text(f"before\n{study.MARK}\nold\n{study.MARK}\nafter\n")
    return options


def test_the_table_holds_the_scores_of_the_runs(options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "--data", "/some/where/data", "--seeds", "0", "1"])
    jobs = [("resnet18", start, seed) for seed in (0, 1) for start in study.STARTS]
    study.write_results(jobs, options)
    table = options.results.with_suffix(".md").read_text()
    assert "| resnet18 | SparK | 2 | 0.600 (0.500-0.700) | 0.250 (0.250-0.250) |" in table
    assert "| resnet18 | scratch | 2 | 0.400 (0.400-0.400) |" in table
    assert "one pretraining an encoder" in table
    assert "/some/where" not in table
    with open(options.results.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["start"], r["seed"], r["delta1"], r["pretrain_epochs"]) for r in rows] == [
        ("spark", "0", "0.50000", "5"),
        ("scratch", "0", "0.40000", "0"),
        ("spark", "1", "0.70000", "5"),
        ("scratch", "1", "0.40000", "0"),
    ]
    readme = options.readme.read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "0.600 (0.500-0.700)" in readme
    assert "old" not in readme


def test_random_weights_get_a_good_start():
    assert study.good_start("resnet18") == {"model.encoder_options": '{"zero_init_last": false}'}
    assert study.good_start("convnext_atto") == {}


def test_only_scratch_gets_it_and_an_older_run_is_not_taken_for_one(options, monkeypatch):
    called = []
    monkeypatch.setattr(study, "depth", lambda run, encoder, *_, **more: called.append((str(encoder), more)))
    options.protocol = "nyu-bts"
    for start in study.STARTS:
        study.finetune("resnet18", start, 0, options)
    assert called == [
        (str(study.pretraining_of("resnet18", options) / "encoder"), {}),
        ("resnet18", {"model.encoder_options": '{"zero_init_last": false}'}),
    ]
    path = study.run_of("resnet18", "scratch", 1, options) / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": {}}))
    with pytest.raises(SystemExit, match="depth_resnet18_scratch_1 began from other random weights"):
        study.write_results([("resnet18", "scratch", 1)], options)


def test_a_readme_without_marks_is_left_alone(options):
    options.readme.write_text("no marks\n")
    with pytest.raises(SystemExit, match="must hold the mark"):
        study.put_between_marks(options.readme, "table")
    assert options.readme.read_text() == "no marks\n"


def test_photos_and_training_images_are_listed_but_no_validation_image(tmp_path):
    nyu = tmp_path / "data" / "nyu"
    nyu.mkdir(parents=True)
    (nyu / "nyu_train.txt").write_text(
        "/a/rgb_1.jpg /a/sync_depth_1.png 518.8\n\n/b/rgb_2.jpg /b/sync_depth_2.png 518.8\n"
    )
    (nyu / "nyu_val.txt").write_text("/c/rgb_3.jpg /c/sync_depth_3.png 518.8\n")
    lines = study.write_image_list(tmp_path / "data", tmp_path / "images.txt").read_text().splitlines()
    assert lines == [str(tmp_path / "data" / "images"), str(nyu / "a/rgb_1.jpg"), str(nyu / "b/rgb_2.jpg")]


def test_a_missing_folder_is_a_sentence(tmp_path, capsys, monkeypatch):
    arguments = [
        "--data",
        str(tmp_path),
        "--output_dir",
        str(tmp_path / "o"),
        "--results",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    with pytest.raises(SystemExit):
        study.main()
    assert "must hold images/ and nyu/" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
