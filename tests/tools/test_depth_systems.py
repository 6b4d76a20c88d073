"""tools/depth_systems.py: systems, the relations that it writes, and the table, on runs written by hand."""

import csv
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from finetune import DepthModel
from finetune.depth_data import open_depth_data
from tests.depth_world import make_depth_world

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # as when a tool is run as a script

import depth_systems as tool


def test_every_system_has_its_cards():
    for system in tool.SYSTEMS.values():
        for card in filter(None, (system.card, system.then)):
            assert (tool.ROOT / "configs" / "depth" / f"{card}.yaml").is_file()


def test_phases_keep_their_share_of_the_run():
    card = {"epochs": 10, "optim": {"frozen_epochs": 2, "warmup_epochs": 0}}
    assert tool.shares(card, 5) == {"optim.frozen_epochs": 1.0}
    assert tool.shares({"epochs": 15, "optim": {"warmup_epochs": 1}}, 3) == {"optim.warmup_epochs": 0.2}


def test_relations_are_those_of_the_depth(tmp_path: Path):
    nyu = make_depth_world(tmp_path / "nyu", train=3, val=2)
    tool.write_diw(nyu, tmp_path / "diw")
    metres = open_depth_data(nyu, "nyu_train.txt")
    data = open_depth_data(tmp_path / "diw", None, "train")
    assert (len(data), data.supervision) == (3, "ordinal")
    for index in range(3):
        pairs, relation = data[index].pairs, data[index].relation
        assert pairs is not None
        assert relation is not None
        ya, xa, yb, xb = pairs[0].astype(int)
        a, b = metres[index].metres[ya, xa], metres[index].metres[yb, xb]
        assert min(a, b) > 0
        assert relation[0] == np.sign(a - b)
        assert max(a, b) > tool.RATIO * min(a, b)
    assert len(open_depth_data(tmp_path / "diw", None, "test")) == 2


def test_a_flat_map_has_no_relation():
    assert tool.draw_relation(np.full((4, 4), 2.0), np.random.default_rng(0)) is None
    assert tool.draw_relation(np.zeros((4, 4)), np.random.default_rng(0)) is None


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    return Namespace(
        data=tmp_path,
        output_dir=tmp_path / "runs",
        results=tmp_path / "results" / "table",
        encoder="test_resnet",
        size=[32, 64],
        epochs=3.0,
        diw_epochs=1.0,
        pretrain_epochs=5.0,
        batch_size=2,
        diw=None,
        precision="fp32",
        protocol="nyu-bts",
        rounds=1,
    )


def test_a_stage_is_told_the_budget_and_its_old_scores_go(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[str, dict]] = []
    monkeypatch.setattr(tool, "call", lambda script, **given: calls.append((script, given)))
    monkeypatch.setattr(tool, "require_finished", lambda *_: None)
    run = tool.run_of("unetpp_resnext50", "spark", 0, options)
    run.mkdir(parents=True)
    (run / "results.json").write_text("old")
    tool.train("unetpp_resnext50", "spark", 0, options)
    scripts = [script for script, _ in calls]
    assert scripts == ["finetune/depth.py", "finetune/evaluate.py"] * 2 + ["finetune/evaluate.py"] * 2
    first, second = (given for script, given in calls if script == "finetune/depth.py")
    assert first["encoder"] == options.output_dir / "pretrain_resnext50_32x4d" / "encoder"
    assert (first["epochs"], first["optim.batch_size"], first["optim.frozen_epochs"]) == (3.0, 2, 0.6)
    assert first["data.image_size"] == first["data.crop_size"] == "[32, 64]"
    assert second["model.init"] == run / "model"
    assert second["epochs"] == 1.0
    assert not (run / "results.json").exists()


def test_only_scratch_gets_a_good_start_and_an_older_run_is_not_taken_for_one(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
):
    calls: list[dict] = []
    monkeypatch.setattr(
        tool, "call", lambda script, **given: calls.append(given) if "depth" in script else None
    )
    monkeypatch.setattr(tool, "require_finished", lambda *_: None)
    for start in tool.STARTS:
        tool.train("unetpp_resnext50", start, 0, options)
    given = [call.get("model.encoder_options") for call in calls]
    assert given == ['{"zero_init_last": false}'] * 2 + [None] * 2  # both stages of each
    for stage in ("nyu", "diw"):
        run = tool.run_of("unetpp_resnext50", "scratch", 0, options, stage)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {}}))
        with pytest.raises(SystemExit, match=f"unetpp_resnext50_{stage}_scratch_0 began from other random"):
            tool.train("unetpp_resnext50", "scratch", 0, options)
        (run / "config.yaml").unlink()
    assert len(calls) == 4


def test_the_table_holds_scores_and_costs(options: Namespace, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = DepthModel("test_resnet", decoder_channels=(8, 8, 8, 8, 8), image_size=(32, 64))
    config = {"epochs": 3, "optim": {"batch_size": 2}, "data": {"image_size": [32, 64]}, "precision": "fp32"}

    def score(name: str, start: str, stage: str, delta1: float, whdr: float | None = None) -> None:
        path = tool.result_of(name, start, 0, options, stage)
        model.save(path.parent / "model")
        (path.parent / "config.yaml").write_text(yaml.safe_dump(config))
        results = {"metrics": dict.fromkeys(tool.SHOWN, 0.25) | {"delta1": delta1}}
        more = {"images": 9, "protocol": "nyu-bts", "settings": {"flip_average": False}}
        path.write_text(json.dumps({**results, **more}))
        if whdr is not None:
            path.with_name("diw.json").write_text(json.dumps({"metrics": {"whdr": whdr}}))

    score("unetpp", "scratch", "nyu", 0.4)
    score("unetpp", "spark", "nyu", 0.5)
    score("lraspp", "scratch", "nyu", 0.3, whdr=0.45)
    score("lraspp", "scratch", "diw", 0.1, whdr=0.25)
    monkeypatch.setattr(sys, "argv", ["depth_systems.py", "--data", "/some/where", "--diw", "/else/where"])
    jobs = [("unetpp", "scratch", 0), ("unetpp", "spark", 0), ("lraspp", "scratch", 0)]
    latency = tool.latencies(jobs, options)
    assert latency["unetpp"] == 1.0
    tool.write_results(jobs, latency, options)
    with open(options.results.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["system"], r["stage"], r["start"], r["delta1"], r["whdr"]) for r in rows] == [
        ("unetpp", "nyu", "scratch", "0.40000", ""),
        ("unetpp", "nyu", "spark", "0.50000", ""),
        ("lraspp", "nyu", "scratch", "0.30000", "0.45000"),
        ("lraspp", "nyu, then diw", "scratch", "0.10000", "0.25000"),
    ]
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert {float(row["parameters_M"]) for row in rows} == {round(wanted, 2)}
    assert all(float(row["gmacs"]) >= 0 and float(row["latency_ratio"]) > 0 for row in rows)
    assert rows[2]["diw"] == "written from NYU"
    table = options.results.with_suffix(".md").read_text()
    assert "| UNet++ | test_resnet | nyu | SparK |" in table
    assert "| LR-ASPP | mobilenetv3_large_100 | nyu, then diw | scratch |" in table
    assert "written from NYU" in table
    assert "where" not in table.rpartition("Written by")[2]
