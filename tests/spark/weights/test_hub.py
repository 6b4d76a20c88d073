"""Hugging Face layout: model cards from what runs wrote, loading, upload and download without a network."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from finetune import DepthModel, load_depth_model
from finetune.commands import export as export_depth
from finetune.model.calibration import Calibration
from finetune.model.depth_model import write_calibration
from finetune.model.prediction import predict_image
from spark import load_encoder, save_encoder
from spark.commands import export as export_encoder
from spark.model.encoder import build_encoder
from spark.report import card as cards
from spark.weights import hub

SCORES = {"delta1": 0.4857493933431284, "abs_rel": 0.28522287240372085, "rmse": 0.9946786980305087}


def pretraining_run(folder: Path, data: str = "/pictures/someone/photos") -> Path:
    torch.manual_seed(0)
    encoder = save_encoder(
        build_encoder("test_resnet"), folder / "encoder", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64
    )
    config = {
        "model": {"name": "test_resnet", "input_size": 64, "mask_ratio": 0.6},
        "data": {"train": data},
        "optim": {"name": "lamb", "base_lr": 0.04, "batch_size": 64},
        "epochs": 5.0,
        "precision": "bf16",
        "seed": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": 450, "loss": 0.7, "knn": 0.3125}, {"step": 461, "loss": 0.67354}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return encoder


def depth_run(folder: Path, encoder: Path) -> Path:
    model = DepthModel(encoder, decoder_channels=(16, 16, 8, 8, 8), image_size=(48, 64)).save(
        folder / "model"
    )
    config = {
        "encoder": str(encoder),
        "model": {"head": "unetpp"},
        "data": {"root": "/data/secret/nyu", "list": "nyu_train.txt", "val_list": "nyu_val.txt", "sets": []},
        "losses": {"silog": 1.0},
        "optim": {"name": "adamw", "lr": 0.0005, "batch_size": 16, "schedule": "onecycle"},
        "epochs": 15.0,
        "protocol": "nyu-bts",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 649, "loss": 2.46109}) + "\n")
    settings = {"description": "NYU as BTS.", "expected_images": 654}
    evaluation = {"protocol": "nyu-bts", "images": 103, "metrics": SCORES, "settings": settings}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return depth_run(tmp_path / "depth", pretraining_run(tmp_path / "pretrain"))


def error_of(capsys: pytest.CaptureFixture[str], main, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err


def rows_of(card: ModelCard) -> dict[str, str]:
    lines = [line.strip("|").split("|") for line in card.text.splitlines() if line.startswith("| ")]
    return {name.strip(): value.strip() for name, value in lines}


def test_encoder_with_its_card(tmp_path: Path) -> None:
    encoder, out = pretraining_run(tmp_path / "pretrain"), tmp_path / "out"
    options = ["--license", "mit", "--datasets", "someone/photos"]
    export_encoder.main(["--checkpoint", str(encoder), "--output", str(out), *options])
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    stock = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(stock.eval()(images), load_encoder(encoder).eval()(images))
    card = ModelCard.load(out / "README.md")
    told = card.data.to_dict()
    assert (told["library_name"], told["license"], told["datasets"]) == ("timm", "mit", ["someone/photos"])
    assert "timm" in told["tags"]
    rows = rows_of(card)
    assert rows["images"] == "photos"
    assert (rows["steps done"], rows["loss of the last logged step"]) == ("461", "0.67354")
    assert (rows["epochs"], rows["mask ratio"], rows["seed"]) == ("5", "0.6", "3")
    assert rows["frozen features"] == "knn: 0.3125"
    assert "someone/photos" not in card.text  # no path of this machine
    assert "not measured" in card.text


def test_an_encoder_without_a_run_says_so(tmp_path: Path) -> None:
    folder = save_encoder(build_encoder("test_resnet"), tmp_path / "mine")
    export_encoder.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Read from mine; data and recipe: not recorded." in card.text
    assert "license" not in card.data.to_dict()


def test_data_of_the_hub_are_named_in_the_front_matter(tmp_path: Path) -> None:
    encoder = pretraining_run(tmp_path / "pretrain", "hf:someone/rooms:train:image")
    export_encoder.main(["--checkpoint", str(encoder), "--output", str(tmp_path / "out")])
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()["datasets"] == ["someone/rooms"]


def test_depth_model_with_its_card(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_depth.main(["--model", str(model), "--output", str(out)])
    export_depth.main(["--model", str(model), "--output", str(out)])  # replaces its own
    photo = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    got, wanted = (predict_image(load_depth_model(folder), photo) for folder in (out, model))
    np.testing.assert_array_equal(got, wanted)
    card = ModelCard.load(out / "README.md")
    told = card.data.to_dict()
    assert told["pipeline_tag"] == "depth-estimation"
    assert {"license", "base_model", "datasets", "library_name"}.isdisjoint(told)
    (entry,) = told["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in entry["metrics"]} == SCORES
    assert "nyu-bts" in entry["dataset"]["name"]
    rows = rows_of(card)
    assert (rows["data"], rows["list"], rows["losses"]) == ("nyu", "nyu_train.txt", "silog: 1")
    assert (rows["learning rate"], rows["validated under"]) == ("0.0005", "nyu-bts")
    assert (rows["delta1"], rows["rmse"], rows["calibration"]) == ("0.485749", "0.994679", "none")
    assert rows["mask ratio"] == "0.6"  # of the encoder's pretraining
    assert "on 103 images (nyu nyu_val.txt). NYU as BTS." in card.text
    assert "official list of this protocol has 654 images" in card.text
    assert "secret" not in card.text
    assert str(tmp_path) not in card.text


def test_a_calibration_is_in_the_card_and_its_scores_are_not(model: Path, tmp_path: Path) -> None:
    write_calibration(model, Calibration("depth", 1.5, 0.0, 0.001, 15.0, "two known distances"))
    export_depth.main(["--model", str(model), "--output", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "two known distances" in rows_of(card)["calibration"]
    assert "Measured before the calibration" in card.text
    assert "model-index" not in card.data.to_dict()
    assert load_depth_model(tmp_path / "out").calibration == load_depth_model(model).calibration


def test_results_of_evaluate(model: Path, tmp_path: Path, capsys) -> None:
    best = load_depth_model(model).save(model.parent / "best")
    out, file = tmp_path / "out", tmp_path / "results.json"
    results = {"protocol": "nyu-eigen", "images": 654, "metrics": {"abs_rel": 0.125}, "model": str(best)}
    file.write_text(json.dumps({**results, "data": "NYU, 654 pairs of /data/nyu/test.txt under /data/nyu"}))
    export_depth.main(["--model", str(best), "--output", str(out)])
    assert "Scores: not measured." in (out / "README.md").read_text()  # evaluation.json is of model/
    export_depth.main(["--model", str(best), "--output", str(out), "--results", str(file)])
    card = ModelCard.load(out / "README.md")
    assert "on 654 images (NYU, 654 pairs of test.txt under nyu)" in card.text
    assert rows_of(card)["abs_rel"] == "0.125"

    fitted = {
        "settings": {"alignment": "depth", "depth": "filled"},
        "ground_truth": None,
        "metrics": {"abs_rel": 0.0625},
        "protocol": "nyu-marigold",
    }
    file.write_text(
        json.dumps({"protocols": [results, {**results, **fitted}], "left_out": {"diw": "no pairs"}})
    )
    export_depth.main(["--model", str(best), "--output", str(out), "--results", str(file)])
    card = ModelCard.load(out / "README.md")
    plain, aligned = card.text.split("Protocol `")[1:]
    assert "| abs_rel | 0.125 |" in plain
    assert "Fitted to the ground truth" not in plain
    assert aligned.startswith("nyu-marigold` on 654 images")
    assert "Fitted to the ground truth of each image (alignment depth)" in aligned
    assert "| abs_rel | 0.0625 |" in aligned
    assert ("Stands on filled depth" in plain, "Stands on filled depth" in aligned) == (False, True)
    entries = card.data.to_dict()["model-index"][0]["results"]
    assert [(one["dataset"]["config"], one["metrics"]) for one in entries] == [
        ("nyu-eigen", [{"type": "abs_rel", "value": 0.125}]),
        ("nyu-marigold", [{"type": "abs_rel", "value": 0.0625}]),
    ]
    # scores of the model as it was before its calibration, and then of the calibrated one
    calibration = Calibration("depth", 1.5, 0.0, 0.001, 15.0, "two known distances")
    write_calibration(best, calibration)
    for stated, stale in ((None, True), (calibration.as_config(), False)):
        file.write_text(json.dumps({**results, **({} if stated is None else {"calibration": stated})}))
        export_depth.main(["--model", str(best), "--output", str(out), "--results", str(file)])
        assert ("Measured before the calibration" in (out / "README.md").read_text()) == stale

    taken = error_of(capsys, export_encoder.main, "--checkpoint", model, "--output", tmp_path / "no")
    assert "is of a model with a head, not of an encoder" in taken
    command = ("--model", model, "--output", tmp_path / "no", "--results", file)
    said = error_of(capsys, export_depth.main, *command)
    assert f"names the model that it scored by a path alone, {best}, which is not {model} from here" in said
    for content in ("{}", "{", "[]", '{"protocols": []}', '{"protocols": [{}]}'):
        file.write_text(content)
        assert "holds no results" in error_of(capsys, export_depth.main, *command)
    (model.parent / "metrics.jsonl").write_text("{\n{}\n")
    assert "one is damaged" in error_of(capsys, export_depth.main, *command[:4])
    assert not (tmp_path / "no").exists()


def test_results_are_told_by_the_weights_not_by_the_path(model: Path, tmp_path: Path, capsys) -> None:
    """A copy has the scores of the original; what lies at its path later on has not."""
    out, file, copy = tmp_path / "out", tmp_path / "results.json", tmp_path / "copy"
    shutil.copytree(model, copy)
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    config = json.loads((model / "config.json").read_text())
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    stated = {"weights": weights, "config": hashlib.sha256(canonical).hexdigest()}
    assert load_depth_model(copy).sha256 == stated
    results = {"protocol": "nyu-bts", "images": 9, "metrics": {"rmse": 0.125}, "model": "runs/else"}
    file.write_text(json.dumps({**results, "model_sha256": stated, "data": "rooms"}))
    command = ("--model", str(copy), "--output", str(out), "--results", str(file))
    export_depth.main(command)
    card = (out / "README.md").read_text()
    assert "| rmse | 0.125 |" in card
    assert "name the model by its path alone" not in card
    export_depth.main(["--model", str(out), "--output", str(tmp_path / "again"), "--results", str(file)])

    write_calibration(copy, Calibration("depth", 1.5, 0.0, 0.001, 15.0, "two known distances"))
    export_depth.main(command)  # weights and all else are the same
    assert "Measured before the calibration" in (out / "README.md").read_text()
    config["max_depth"] = 20.0
    (copy / "config.json").write_text(json.dumps(config))
    assert "SHA-256 of the config differs" in error_of(capsys, export_depth.main, *command)
    shutil.copy(model / "config.json", copy)
    other = load_depth_model(copy)
    next(other.parameters()).data.add_(1)
    other.save(copy)
    said = error_of(capsys, export_depth.main, *command)
    assert (
        f"scores of runs/else as it was then, not of {copy} as it is, for the SHA-256 of the weights" in said
    )
    file.write_text(json.dumps({**results, "model": str(copy)}))
    export_depth.main(command)
    assert "name the model by its path alone" in (out / "README.md").read_text()
    file.write_text(json.dumps({key: value for key, value in results.items() if key != "model"}))
    assert "scores of no model, but of predictions or a baseline" in error_of(
        capsys, export_depth.main, *command
    )


def test_a_runs_own_evaluation_is_of_the_weights_that_it_scored(model: Path, tmp_path: Path) -> None:
    """model/ may be exported again, by a run that was resumed and has not ended."""
    own = model.parent / "evaluation.json"
    evaluation = json.loads(own.read_text())
    for stated, told in ((load_depth_model(model).sha256, True), ({"weights": "0", "config": "0"}, False)):
        own.write_text(json.dumps({**evaluation, "model_sha256": stated}))
        export_depth.main(["--model", str(model), "--output", str(tmp_path / "out")])
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("| rmse | 0.994679 |" in card, "Scores: not measured." in card) == (told, not told)


def test_what_makes_scores_less_is_on_the_card(model: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "results.json"
    results = {
        "protocol": "nyu-bts",
        "images": 100,
        "metrics": SCORES,
        "model": str(model),
        "data": "NYU, rooms",
    }
    flipped = {"settings": {"flip_average": True}, "skipped": ["a.jpg", "b.jpg"], "image_size": [96, 128]}
    flipped["white_border"] = "fill"
    spoilt = {
        "nonfinite_pixels": 7,
        "nonfinite_images": 1,
        "undefined": {"pe_fla": 3},
        "image_size": [48, 64],
    }
    file.write_text(json.dumps({"protocols": [{**results, **flipped}, {**results, **spoilt}]}))
    export_depth.main(["--model", str(model), "--output", str(out), "--results", str(file)])
    card = ModelCard.load(out / "README.md")
    first, second = card.text.split("Protocol `")[
        1:
    ]  # what the run says of the same scores is not said again
    assert "2 of 102 images left out for want of a pixel that counts, the first is a.jpg." in first
    assert "The model saw images at 96x128 px." in first
    assert "The white border of the images was filled" in first
    assert "white border" not in second
    assert "7 predicted values, in 1 image, not finite" in second
    assert "3 images without PE flat" in second
    assert "saw images at" not in second
    entries = card.data.to_dict()["model-index"][0]["results"]
    assert [one["dataset"]["config"] for one in entries] == [
        "nyu-bts with flip average, white border fill",
        "nyu-bts",
    ]
    assert {one["dataset"]["type"] for one in entries} == {"nyu-rooms"}
    assert [len(one["metrics"]) for one in entries] == [3, 3]


def test_a_card_is_of_the_step_of_the_weights(model: Path, tmp_path: Path) -> None:
    """Not of the end of the run: of RUN/best, and of a checkpoint; and whether they are averaged."""
    run, best = model.parent, load_depth_model(model).save(model.parent / "best")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"select": "rmse", "optim": {**config["optim"], "ema_decay": 0.99}}
    config |= {"encoder": "resnet18", "pretrained": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    scores = [(200, 3.0, 0.5, 1.5), (400, 2.5, 0.25, 0.75), (649, 2.0, 0.75, 1.0)]
    rows = [{"step": s, "loss": loss, "val_delta1": d, "val_rmse": r} for s, loss, d, r in scores]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_depth.main(["--model", str(best), "--output", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    own = card.text.split("## Encoder before it")[0]
    assert "| steps done | 400 |\n| loss of the last logged step | 2.5 |" in own
    assert "| weights | averaged, ema_decay 0.99 |" in own
    assert "on 103 images (nyu nyu_val.txt). NYU as BTS." in card.text
    assert "chosen by these very scores" in card.text
    (entry,) = card.data.to_dict()["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in entry["metrics"]} == {"delta1": 0.25, "rmse": 0.75}
    assert card.data.to_dict()["base_model"] == "timm/resnet18.a1_in1k"  # which weights timm's name means

    pretrained = tmp_path / "pretrain"
    then = cards.read_record(pretrained / "checkpoints" / "step_0000455", cards.PRETRAINING_MARK)
    assert then is not None
    table = cards.pretraining(then)
    assert "| steps done | 455 |\n| loss of the last logged step | 0.7 |\n| weights | not averaged |" in table
    config = yaml.safe_load((pretrained / "config.yaml").read_text())
    config |= {"export_ema": True, "optim": {**config["optim"], "ema_decay": 0.999}}
    (pretrained / "config.yaml").write_text(yaml.safe_dump(config))
    export_encoder.main(["--checkpoint", str(pretrained / "encoder"), "--output", str(tmp_path / "e")])
    rows = rows_of(ModelCard.load(tmp_path / "e" / "README.md"))
    assert (rows["steps done"], rows["weights"]) == ("461", "averaged, ema_decay 0.999")


def test_upload(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    calls: list[tuple] = []

    class Api:
        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if repo_id == "me/full":
                raise OSError("403 Forbidden")
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(hub, "HfApi", Api)
    out = tmp_path / "out"
    export_depth.main(["--model", str(model), "--output", str(out), "--push_to_hub", "me/depth", "--private"])
    files = ["README.md", "config.json", "model.safetensors"]
    assert calls == [("create", "me/depth", True, True), ("upload", "me/depth", files)]
    assert "https://huggingface.co/me/depth" in capsys.readouterr().out
    assert 'load_depth_model("hf-hub:me/depth")' in (out / "README.md").read_text()
    encoder = tmp_path / "pretrain" / "encoder"
    error = error_of(
        capsys,
        export_encoder.main,
        "--checkpoint",
        encoder,
        "--output",
        tmp_path / "e",
        "--push_to_hub",
        "me/full",
    )
    assert "is written, but was not uploaded as me/full (403 Forbidden)" in error
    assert 'timm.create_model("hf-hub:me/full"' in (tmp_path / "e" / "README.md").read_text()


def test_download(model: Path, monkeypatch) -> None:
    def snapshot(repo, *, revision, allow_patterns):
        if repo != "me/depth":
            raise OSError("404 Client Error")
        assert (revision, allow_patterns) == ("v1", ["config.json", "model.safetensors"])
        return str(model)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    got = load_depth_model("hf-hub:me/depth@v1").state_dict()
    assert all(torch.equal(got[key], value) for key, value in load_depth_model(model).state_dict().items())
    with pytest.raises(OSError, match="hf-hub:me/none could not be downloaded"):
        load_depth_model("hf-hub:me/none")
