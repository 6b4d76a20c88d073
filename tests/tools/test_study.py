"""Studies: the commands of their arms, resuming, refusing what is not theirs, and tables from finished runs."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from finetune.config import ClassifyConfig, DepthConfig, SegmentConfig
from finetune.options import EvaluationConfig
from spark.config import PretrainConfig
from spark.training.cli import parse_config
from tools import study

STUDIES = sorted((study.ROOT / "tools" / "studies").glob("*.yaml"))
CONTENT = {
    "about": "A study.",
    "seeds": [0, 1],
    "pretrain": {"config": "configs/pretrain/nyu_{encoder}.yaml", "epochs": 5},
    "depth": {"config": "configs/depth/unetpp_nyu_small.yaml", "epochs": 3, "data.list": "nyu_train.txt"},
    "scores": {"results": {"protocol": "nyu-bts", "data.root": "{data}/nyu"}},
    "arms": [
        {"encoder": "resnet18", "start": "spark"},
        {"encoder": "resnet18", "start": "scratch"},
    ],
    "columns": {
        "encoder": "arm.encoder",
        "start": "arm.start",
        "seed": "seed",
        "delta1": "scores.results.metrics.delta1:.5f",
        "epochs": "pretrain.epochs|0",
        "size": "depth.data.crop_size",
    },
    "table": {"rows": {"encoder": "encoder", "start": "start"}, "values": {"delta1": "δ1 ↑"}},
    "differences": {"column": "start", "baseline": "scratch", "equal": ["encoder"], "metrics": ["delta1"]},
    "figure": {"x": "epochs", "y": "delta1", "lines": ["encoder"]},
}
METRICS = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
DELTA1 = {"spark": (0.5, 0.7), "scratch": (0.4, 0.4)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders of images and of NYU: eight scenes to train on."""
    (tmp_path / "data" / "images" / "scenes").mkdir(parents=True)
    (tmp_path / "data" / "images" / "scenes" / "a.jpg").touch()
    nyu = tmp_path / "data" / "nyu"
    nyu.mkdir()
    lines = [f"/s{i % 8}/rgb_{i}.jpg /s{i % 8}/sync_depth_{i}.png 518.8\n" for i in range(16)]
    (nyu / "nyu_train.txt").write_text("".join(lines))
    (nyu / "nyu_val.txt").write_text("/v/rgb_3.jpg /v/sync_depth_3.png 518.8\n")
    return tmp_path / "data"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was run; every command leaves the files of a finished run at once."""
    made: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **options: object) -> Done:
        if command[0] == "git":
            raise AssertionError("versions are given")
        command = command[1:]
        made.append(command)
        given = dict(zip(command[1::2], command[2::2], strict=False))
        if "--output_dir" in given:
            folder = Path(given["--output_dir"])
            result = folder / ("encoder" if "pretrain" in command[0] else "model")
            result.mkdir(parents=True)
            (result / "model.safetensors").touch()
            config = {"epochs": float(given["--epochs"]), "data": {"crop_size": [128, 160]}}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            rows = [{"step": 1, "epoch": float(given["--epochs"]), "loss": 0.5}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif "finetune/evaluate.py" in command:
            folder = Path(given["--model"]).parent
            value = DELTA1[folder.name.split("_")[-2]][int(folder.name[-1])]
            images = [
                {"name": f"s{i % 3}/{i}.jpg", "pixels": 9, **dict.fromkeys(METRICS, value)} for i in range(6)
            ]
            results = {
                "protocol": "nyu-bts",
                "images": 6,
                "settings": {"family": "depth", "aggregation": "per_image"},
                "metrics": {"delta1": value},
                "per_image": images,
            }
            Path(given["--output"]).write_text(json.dumps(results))
        return Done()

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(study, "versions", lambda: {"code": "a", "torch": "2", "timm": "1"})
    return made


def run_study(data: Path, content: dict, *more: str) -> Path:
    """Run a study; returns the folder of the results."""
    out = data.parent
    (out / "study.yaml").write_text(yaml.safe_dump(content))
    fixed = ["--data", data, "--output_dir", out / "runs", "--results", out / "table"]
    study.main([str(out / "study.yaml"), *map(str, fixed), *more])
    return out


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_commands_tables_and_resuming(data, commands):
    out = run_study(data, CONTENT)
    scripts = [command[0] for command in commands]
    assert scripts == ["spark/pretrain.py", *["finetune/depth.py", "finetune/evaluate.py"] * 4]
    spark, scratch = commands[1], commands[3]
    assert option(spark, "encoder") == str(out / "runs" / "pretrain_resnet18" / "encoder")
    assert option(scratch, "encoder") == "resnet18"
    assert option(scratch, "model.encoder_options") == '{"zero_init_last": false}'  # a fair start
    assert "--model.encoder_options" not in spark
    rows = read(out / "table.csv")
    assert [(r["start"], r["seed"], r["delta1"], r["epochs"], r["size"]) for r in rows] == [
        ("spark", "0", "0.50000", "5.0", "128x160"),
        ("scratch", "0", "0.40000", "0", "128x160"),
        ("spark", "1", "0.70000", "5.0", "128x160"),
        ("scratch", "1", "0.40000", "0", "128x160"),
    ]
    table = (out / "table.md").read_text()
    assert "| resnet18 | spark | 2 | 0.600 (0.500-0.700) |" in table
    assert "--data $SPARK_DATA" in table
    assert str(data) not in table
    (difference,) = read(out / "table_differences.csv")
    assert (difference["difference"], difference["scenes"], difference["seeds"]) == (
        "+0.2000",
        "3",
        "2 and 2",
    )
    assert float(difference["low"]) == pytest.approx(0.1)
    assert float(difference["high"]) == pytest.approx(0.3)
    assert (out / "table.png").exists()
    before = len(commands)
    assert run_study(data, CONTENT) == out
    assert len(commands) == before  # what is done is not done again
    assert read(out / "table.csv") == rows


def test_a_row_is_there_once_all_its_scores_are(data, commands, monkeypatch):
    probed = {**CONTENT, "probe": {"data": "{data}/images"}, "seeds": [0]}
    probed["columns"] = {**CONTENT["columns"], "linear": "probe.linear.val:.2f"}
    probed["arms"] = [
        *CONTENT["arms"],
        {"name": "alone", "encoder": "resnet50", "start": "spark", "depth": None},
    ]
    probed["pretrain"] = {
        **CONTENT["pretrain"],
        "name": "{encoder}",
        "config": "configs/pretrain/nyu_resnet18.yaml",
    }
    done = study.subprocess.run

    def probe_written(command: list[str], **options: object) -> object:
        if "spark.commands.probe" in command:
            result = {"encoders": [{"linear": {"val": 0.5}}]}
            Path(command[command.index("--output") + 1]).write_text(json.dumps(result))
        return done(command, **options)

    monkeypatch.setattr(study.subprocess, "run", probe_written)
    out = run_study(data, probed)
    (out / "runs" / "depth_resnet18_spark_0" / "results.json").unlink()
    run_study(data, probed, "--table")
    rows = [(row["encoder"], row["start"], row["linear"], row["delta1"]) for row in read(out / "table.csv")]
    assert rows == [("resnet18", "scratch", "", "0.40000"), ("resnet50", "spark", "0.50", "")]


def test_what_was_made_otherwise_is_refused(data, commands, monkeypatch):
    out = run_study(data, CONTENT)
    longer = {**CONTENT, "pretrain": {**CONTENT["pretrain"], "epochs": 7}}
    with pytest.raises(SystemExit, match=r"pretrain_resnet18 was made by another command"):
        run_study(data, longer)
    monkeypatch.setattr(study, "versions", lambda: {"code": "b", "torch": "2", "timm": "1"})
    with pytest.raises(SystemExit, match="one study has one version"):
        run_study(data, CONTENT)
    monkeypatch.setattr(study, "versions", lambda: {"code": "a", "torch": "2", "timm": "1"})
    (out / "runs" / "pretrain_resnet18" / study.RECORD).unlink()
    with pytest.raises(SystemExit, match="was not made by this study"):
        run_study(data, CONTENT)


def test_a_run_that_was_stopped_stops_the_study(data, commands, monkeypatch):
    monkeypatch.setattr(study.Step, "done", property(lambda step: False))
    with pytest.raises(SystemExit, match="continues from here"):
        run_study(data, CONTENT)
    assert len(commands) == 1


def test_a_run_is_finished_at_its_last_epoch_only(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "model.safetensors").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 5.01}\n')
    assert study.Step(tmp_path, (), "encoder", "epoch", 5).done
    assert not study.Step(
        tmp_path, (), "encoder", "epoch", 6
    ).done  # the result may have been asked for on the way
    (tmp_path / "encoder" / "model.safetensors").unlink()
    assert not study.Step(tmp_path, (), "encoder", "epoch", 5).done


def test_another_process_that_is_at_a_step_is_left_alone(data, commands):
    record = data.parent / "runs" / "pretrain_resnet18" / study.RECORD
    record.parent.mkdir(parents=True)
    with study.FileLock(f"{record}.lock"):
        run_study(data, CONTENT)
    assert {command[0] for command in commands} == {"finetune/depth.py", "finetune/evaluate.py"}
    assert all(option(c, "encoder") == "resnet18" for c in commands if c[0] == "finetune/depth.py")


def test_shares_of_labels_and_images(data, commands):
    arms = [
        {"name": "a", "encoder": "resnet18", "start": "scratch", "labels": 0.5},
        {"name": "b", "encoder": "resnet18", "start": "spark", "images": ["nyu/nyu_train.txt"]},
    ]
    steps = [s for row in study.Study({**CONTENT, "arms": arms}, data, data.parent).rows() for s in row.steps]
    half = Path(option(list(steps[0].command), "data.list")).read_text().splitlines()
    assert len({study.scene_of(line.split()[0]) for line in half}) == 4
    assert len(half) == 8
    (images,) = {option(list(s.command), "data.train") for s in steps if s.result == "encoder"}
    lines = Path(images).read_text().splitlines()
    assert len(lines) == 16
    assert lines[0] == str(data / "nyu" / "s0" / "rgb_0.jpg")
    arm = {"name": "c", "encoder": "resnet18", "labels": 0.5, "command": "python x.py --list {label_list}"}
    (row,) = study.Study({**CONTENT, "arms": [arm], "seeds": [0]}, data, data.parent).rows()
    assert Path(option(list(row.steps[0].command), "list")).read_text().splitlines() == half
    default = study.image_list({}, data, data.parent).read_text().splitlines()
    assert default == [str(data / "images"), *lines]  # no validation image


def test_arms_of_several_lengths_branch_off_one_trunk(data, tmp_path):
    end = {"optim.cooldown_epochs": 1}
    arms = [
        {
            "name": "a",
            "encoder": "resnet18",
            "start": "spark",
            "trunk": [4],
            "pretrain": {"epochs": 5, **end},
        },
        {
            "name": "b",
            "encoder": "resnet18",
            "start": "spark",
            "trunk": [4, 8],
            "pretrain": {"epochs": 9, **end},
        },
    ]
    rows = study.Study({**CONTENT, "arms": arms, "seeds": [0]}, data, tmp_path / "out").rows()
    steps = [[step for step in row.steps if step.result == "encoder"] for row in rows]
    assert [[step.makes.name.removeprefix("pretrain_resnet18_") for step in part] for part in steps] == [
        ["trunk_4", "5"],
        ["trunk_4", "trunk_8", "9"],
    ]
    assert steps[0][0] == steps[1][0]
    trunk, longer, last = steps[1]
    assert [option(list(step.command), "optim.cooldown_epochs") for step in steps[1]] == ["0", "0", "1"]
    assert option(list(trunk.command), "resume") == "true"
    assert option(list(last.command), "resume") == str(longer.makes)
    # Begun, it goes on from what it has itself; its record stays the same.
    (last.makes / "checkpoints").mkdir(parents=True)
    assert option(last.now, "resume") == "true"
    assert option(list(last.command), "resume") == str(longer.makes)


def test_rows_made_elsewhere_stay_when_asked_for(data, commands):
    out = run_study(data, CONTENT)
    rows = read(out / "table.csv")
    row = {**rows[0], "encoder": "resnet50"}
    (out / "table.csv").write_text(study.rows_as_csv([*rows, row]))
    run_study(data, CONTENT, "--keep", "--table")
    assert row in read(out / "table.csv")
    run_study(data, CONTENT, "--table")
    assert read(out / "table.csv") == rows


def test_mistakes_are_one_sentence(data, commands):
    with pytest.raises(SystemExit, match="there is no arm x: there are resnet18_spark"):
        run_study(data, CONTENT, "--only", "x")
    with pytest.raises(SystemExit, match="arms must have different names"):
        run_study(data, {**CONTENT, "arms": CONTENT["arms"] * 2})
    with pytest.raises(SystemExit, match="must hold images/ and nyu/"):
        run_study(data / "images", CONTENT)
    assert not commands


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_have_the_columns_of_their_results_and_commands_that_parse(path, data, monkeypatch):
    content = yaml.safe_load(path.read_text())
    monkeypatch.setattr(study.models, "step_costs", lambda options, *_, **__: {
        name: {"step_speedup": "2.0"} for name in options
    })  # fmt: skip
    table = study.ROOT / "docs" / "results" / f"{path.stem}.csv"
    if table.exists():  # else it was not yet run
        with table.open(encoding="utf-8") as file:
            assert list(content["columns"]) == next(csv.reader(file))
    classes = {
        "spark/pretrain.py": PretrainConfig,
        "finetune/depth.py": DepthConfig,
        "finetune/classify.py": ClassifyConfig,
        "finetune/segment.py": SegmentConfig,
        "finetune/evaluate.py": EvaluationConfig,
    }
    steps = [step for row in study.Study(content, data, data.parent / "runs").rows() for step in row.steps]
    for script, *options in {step.command for step in steps}:
        if script in classes:
            monkeypatch.chdir(study.ROOT)
            parse_config(classes[script], options, "")
