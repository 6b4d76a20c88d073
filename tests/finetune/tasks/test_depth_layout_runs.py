"""finetune/depth.py on every layout, and on several sets at once: two steps each, through the script's main."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from finetune.depth import main
from finetune.evaluate import main as evaluate
from tests import depth_layouts as write


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(root: Path, output: Path, **options: Any) -> list[dict]:
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {
        "encoder": "test_resnet",
        "data.root": root,
        "data.image_size": "[48,64]",
        "data.crop_size": "[32,64]",
        "data.border": "null",
        "data.workers": 0,
        "model.head_options": '{"decoder_channels": [16, 8, 8, 8, 8]}',
        "protocol": "nyu-bts-scaled",
        "optim.batch_size": 2,
        "max_steps": 2,
        "log_every": 1,
        "triptychs": 1,
        "validate_every": 0,
        "output_dir": output,
        **options,
    }
    main([text for name, value in given.items() for text in (f"--{name}", str(value))])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("written", "options", "says"),
    [
        (write.write_labeled, {"data.labels": 13}, "NYU labelled layout, 3 train pairs"),
        (write.write_densedepth, {}, "DenseDepth layout, 4 pairs"),
        (write.write_fastdepth, {}, "FastDepth layout (.h5 files), 4 pairs"),
        (write.write_hub_tars, {}, "Hugging Face layout, 4 train pairs"),
        (
            write.write_folder,
            {"data.depth_scale": 1 / 256, "data.cut_depth": 1, "encoder": "resnet18"},
            "plain folder, 4 pairs",
        ),
    ],
)
def test_a_run_on_each_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Any, options: dict[str, Any], says: str
) -> None:
    rows = run(written(tmp_path / "data"), tmp_path / "run", **options)
    assert len(rows) == 2
    assert all(row["loss"] > 0 for row in rows)
    assert rows[-1]["val_rmse"] < 9  # the split that comes with the layout
    assert says in capsys.readouterr().out


def test_every_supervision_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relations alone; then metres, relations and disparity together, each seen by the loss that it is for."""
    diw, redweb = write.write_diw(tmp_path / "diw"), write.write_redweb(tmp_path / "redweb")
    rows = run(diw, tmp_path / "relations", losses='{"ranking": 1}')
    assert all(row["loss"] > 0 for row in rows)
    assert "where > says that A is farther" in capsys.readouterr().out
    options = {"data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt", "max_steps": 3}
    sets = f"[{{root: {diw}}}, {{root: {redweb}}}]"
    losses = '{"silog": 1, "ranking": 0.1, "ssi": 0.1}'
    rows = run(
        write.write_sync(tmp_path / "sync"), tmp_path / "all", losses=losses, **options, **{"data.sets": sets}
    )
    kinds = [{key for key in row if key.startswith("loss_")} for row in rows]
    assert kinds == [{"loss_silog", "loss_ssi"}, {"loss_ranking"}, {"loss_ssi"}]
    assert rows[-1]["empty_batches"] == 0


def test_several_sets_in_one_run_and_its_exact_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sync, folder = write.write_sync(tmp_path / "sync"), write.write_folder(tmp_path / "own", "pfm")
    further = yaml.safe_dump([{"root": str(folder), "weight": 0.5}], default_flow_style=True).strip()
    options = {"data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt", "data.sets": further}
    whole = run(sync, tmp_path / "whole", **options, max_steps=5, **{"optim.warmup_steps": 0})
    said = capsys.readouterr().out
    assert "66.7% of the micro-batches: nyu_sync: NYU sync layout, 4 pairs" in said
    assert "33.3% of the micro-batches: folder: plain folder, 4 pairs" in said
    assert whole[-1]["epoch"] == pytest.approx(5 * 2 / 8)
    # stop after 3 of 5 steps by a checkpoint, go on
    options |= {"max_steps": 5, "optim.warmup_steps": 0, "checkpoint_every": 3, "keep_checkpoints": 2}
    run(sync, tmp_path / "parts", **options)
    checkpoints = tmp_path / "parts" / "checkpoints"
    again = run(sync, tmp_path / "parts", **options, resume=checkpoints / "step_0000003")
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all((one[key] == other[key]).all() for key in one)
    config = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert config["data"]["sets"][0]["weight"] == 0.5
    assert "changed since that checkpoint" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.kind": "hub_tars", "data.list": "null"}, "no train-*.tar in"),
        ({"data.sets": "[{root: nowhere}]"}, "no folder nowhere"),
        ({"data.sets": "[{root: x, weight: 0}]"}, "weight must be a number above 0"),
        ({"data.labels": 12}, "data.labels must be"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    root = write.write_sync(tmp_path / "sync")
    with pytest.raises(SystemExit) as stopped:
        run(root, tmp_path / "run", **{"data.list": "nyu_train.txt", **options})
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pairs_to_validate_on_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write.write_sync(tmp_path / "sync")
    listed = root / "nyu_val.txt"
    listed.write_text(listed.read_text() + listed.read_text().splitlines()[1])
    with pytest.raises(SystemExit):
        run(root, tmp_path / "run", **{"data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt"})
    said = capsys.readouterr().err
    assert "rgb_0101.png (nyu_val.txt, line 2) is to be scored a second time (nyu_val.txt, line 3)" in said
    assert not (tmp_path / "run").exists()


def test_a_validation_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write.write_sync(tmp_path / "sync")
    write.put(root / "val_room" / "sync_depth_0100.png", write.png(np.zeros(write.SIZE, np.uint16)))
    options = {"data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt", "validate_every": 0.5}
    run(root, tmp_path / "run", **options)
    said = capsys.readouterr().out
    assert said.count("1 of 2 images to validate on have no pixel that counts") == 1  # of two validations
    assert "the first is val_room/rgb_0100.png" in said


def test_relations_have_no_metres_to_validate_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write.write_diw(tmp_path / "diw")
    with pytest.raises(SystemExit):
        run(root, tmp_path / "run", **{"data.val_list": "DIW_train_val.csv"})
    assert "has no depth in metres to validate on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(root, tmp_path / "run", **{"data.val_list": "DIW_train_val.csv", "protocol": "diw"})
    assert "a metric of protocol diw: whdr, accuracy, wkdr" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_depth_in_the_wild_trains_and_validates_by_order(tmp_path: Path) -> None:
    root, other = write.write_diw(tmp_path / "diw"), write.write_diw(tmp_path / "other", train=2)
    shutil.copytree(other / "DIW_train_val", root / "DIW_test")
    csv = (other / "DIW_train_val.csv").read_text()
    (root / "DIW_test.csv").write_text(csv.replace("DIW_train_val", "DIW_test"))
    options = {"protocol": "diw", "select": "whdr", "losses": "{ranking: 1.0}"}
    rows = run(root, tmp_path / "run", **options)  # the official test split is found by itself
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["pairs"]["unequal"] == 2
    assert rows[-1]["val_whdr"] == scores["metrics"]["whdr"]
    assert (tmp_path / "run" / "best" / "config.json").is_file()

    given = {"model": tmp_path / "run" / "model", "protocol": "diw", "data.root": root}
    for polarity in ("farther", "closer"):
        output = tmp_path / f"{polarity}.json"
        more = {"data.polarity": polarity, "output": output, "threshold": 0.25}
        evaluate([text for name, value in {**given, **more}.items() for text in (f"--{name}", str(value))])
    one, reversed_ = (json.loads((tmp_path / f"{p}.json").read_text()) for p in ("farther", "closer"))
    assert one["metrics"]["whdr"] == scores["metrics"]["whdr"]
    assert one["metrics"]["whdr"] + reversed_["metrics"]["whdr"] == 1.0  # no ties
    assert one["settings"]["threshold"] == 0.25
