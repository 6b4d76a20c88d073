"""finetune/classify.py end to end on photos of three colours: what it writes, exact resume, shares, bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from finetune.classify import main
from finetune.model.classifier import load_classifier
from finetune.scoring.classes import class_results, image_row
from finetune.scoring.intervals import resampled
from finetune.tasks.classify import share_of_classes
from spark.monitor.probes import list_labelled
from spark.report import read_run

COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 60), "red": (220, 30, 40)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def run(root: Path, output: Path, **options: Any) -> list[dict]:
    given = {
        "encoder": "test_resnet",
        "data.root": root,
        "data.size": 32,
        "data.workers": 0,
        "optim.batch_size": 8,
        "optim.lr": 3e-3,
        "optim.warmup_steps": 1,
        "max_steps": 12,
        "log_every": 1,
        "validate_every": 2,
        "output_dir": output,
        **options,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    main([text for name, value in given.items() for text in (f"--{name}", str(value))])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_learns_and_leaves_a_model_of_plain_timm(photos: Path, tmp_path: Path) -> None:
    rows = run(photos, tmp_path / "run", max_steps=20)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["metrics"] == {
        "top1": 1.0,
        "class_top1": 1.0,
    }  # colours are easy; of three classes there is no top-5
    assert results["per_class"] == dict.fromkeys(COLOURS, 1.0)
    assert results["confusion"]["red"] == {"red": 3}
    assert rows[-1]["val_top1"] == 1.0
    assert {row["name"] for row in results["per_image"]} == {
        f"val/{n}/{i}.png" for n in COLOURS for i in range(3)
    }

    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True).eval()
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["label_names"] == sorted(
        COLOURS
    )
    ours = load_classifier(tmp_path / "run" / "model")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), ours(images))
    assert read_run(tmp_path / "run").steps == 20
    assert "top-1" in (tmp_path / "run" / "report.html").read_text()


def test_resume_is_exact(photos: Path, tmp_path: Path) -> None:
    options = {"drop_path": 0.2, "smoothing": 0.1, "optim.frozen_epochs": 1, "optim.layer_decay": 0.7}
    options |= {"checkpoint_every": 5, "encoder": "test_convnext", "accumulation": 2, "keep_checkpoints": 3}
    whole = run(photos, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_0000006"
    run(photos, tmp_path / "whole", **options, resume="true")  # a finished run stays as it is
    rest = run(photos, tmp_path / "rest", **options, resume=checkpoint)
    assert [row["loss"] for row in rest if "loss" in row] == [row["loss"] for row in whole[6:]]
    assert rest[0] == {
        name: rest[0][name] for name in ("step", "val_top1", "val_class_top1")
    }  # made up: a new folder
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "rest" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_linear_layer_leaves_the_encoder_as_it_is(photos: Path, tmp_path: Path) -> None:
    encoder = timm.create_model("test_resnet", num_classes=0)
    from spark import save_encoder

    save_encoder(encoder, tmp_path / "encoder")
    run(photos, tmp_path / "run", encoder=tmp_path / "encoder", linear="true", **{"optim.lr": 0.05})
    before, after = weights(tmp_path / "encoder"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after.keys() - before.keys() == {"fc.weight", "fc.bias"}
    assert after["fc.weight"].shape[0] == 3


def test_a_smaller_share_is_part_of_a_larger_one(photos: Path) -> None:
    found = list_labelled(photos)
    shares = {share: share_of_classes(found, share, 0) for share in (0.01, 0.25, 0.5, 1.0)}
    assert [len(chosen) for chosen in shares.values()] == [3, 6, 12, 24]  # at least one of each class
    assert set(shares[0.01]) < set(shares[0.25]) < set(shares[0.5]) < set(shares[1.0])
    assert sorted(found.labels[shares[0.25]].tolist()) == [0, 0, 1, 1, 2, 2]
    assert share_of_classes(found, 0.5, 1) != shares[0.5]


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 7, 50), rng.normal(size=(50, 7))
    rows = [image_row(str(i), logits[i], int(labels[i])) for i in range(50)]
    results = class_results("classification", rows, [str(k) for k in range(7)])
    expected = {
        "top1": top_k_accuracy_score(labels, logits, k=1),
        "top5": top_k_accuracy_score(labels, logits, k=5),
        "class_top1": balanced_accuracy_score(labels, logits.argmax(1)),
    }
    assert results["metrics"] == pytest.approx(expected)
    twice = resampled(results, np.array([[2] * 10 + [0] * 40]))
    few = slice(0, 10)
    assert twice["class_top1"][0] == pytest.approx(
        balanced_accuracy_score(labels[few], logits[few].argmax(1))
    )


def test_bad_input_is_one_sentence(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(**options: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(photos, tmp_path / "run", **options)
        assert stopped.value.code == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "there is no folder" in fails(**{"data.root": tmp_path / "nowhere"})
    (tmp_path / "one" / "train" / "red").mkdir(parents=True)
    (tmp_path / "one" / "val" / "red").mkdir(parents=True)
    for split in ("train", "val"):
        Image.new("RGB", (40, 40)).save(tmp_path / "one" / split / "red" / "a.png")
    assert "a single class" in fails(**{"data.root": tmp_path / "one"})
    assert "data.labels must be" in fails(**{"data.labels": 0})
    assert "labels_seed" in fails(**{"data.label_seed": 0})  # the nearest name
