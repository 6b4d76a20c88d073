"""finetune/segment.py end to end on blocks of three colours: what it writes, exact resume, layouts, bad input."""

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
from sklearn.metrics import confusion_matrix

import finetune
from finetune import SegmentationModel, load_segmentation_model
from finetune.config import SegmentDataConfig
from finetune.scoring.intervals import resampled
from finetune.segment import main
from finetune.tasks.masks import open_masks
from spark import load_encoder, save_encoder
from tests.depth_world import make_depth_world

COLOURS = np.array([(30, 40, 220), (40, 200, 60), (220, 30, 40)])
SIZE = (48, 64)


def write_masks(root: Path, splits: dict[str, int]) -> Path:
    """Images of noisy blocks whose colour is their class, with a void row, in `SPLIT/images` and `SPLIT/masks`."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for kind in ("images", "masks"):
            (root / split / kind / "room").mkdir(parents=True)
        for number in range(count):
            mask = rng.integers(0, 3, (3, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
            pixels = np.clip(rng.normal(COLOURS[mask], 20), 0, 255).astype(np.uint8)
            mask[:3] = 255
            Image.fromarray(pixels).save(root / split / "images" / "room" / f"{number}.jpg", quality=95)
            Image.fromarray(mask).save(root / split / "masks" / "room" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"), {"train": 8, "val": 3})


def run(root: Path, output: Path, **options: Any) -> list[dict]:
    given = {
        "encoder": "test_resnet",
        "data.root": root,
        "data.classes": 3,
        "data.image_size": list(SIZE),
        "data.crop_size": [32, 32],
        "data.zoom": [1, 1],
        "data.workers": 0,
        "decoder_channels": [16, 8, 8, 8, 8],
        "optim.batch_size": 4,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 1,
        "max_steps": 6,
        "log_every": 1,
        "validate_every": 1,
        "output_dir": output,
        **options,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    main([text for name, value in given.items() for text in (f"--{name}", str(value))])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_learns_and_leaves_a_model_whose_scores_are_those_of_scikit_learn(
    masks: Path, tmp_path: Path
) -> None:
    rows = run(masks, tmp_path / "run", max_steps=30, **{"data.classes": '["blue","green","red"]'})
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert rows[-1]["val_miou"] == pytest.approx(results["metrics"]["miou"])

    model = load_segmentation_model(tmp_path / "run" / "model")
    assert model.classes == ["blue", "green", "red"]
    total, by_image = np.zeros((3, 3), int), {}
    for path in sorted((masks / "val" / "masks" / "room").iterdir()):
        truth = np.asarray(Image.open(path))
        predicted = model.predict(masks / "val" / "images" / "room" / f"{path.stem}.jpg")
        assert predicted.dtype == np.uint8
        known = truth != 255
        by_image[path.stem] = confusion_matrix(truth[known], predicted[known], labels=range(3))
        total += by_image[path.stem]

    def scores(confusion: np.ndarray) -> dict[str, float]:
        right = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - right
        return {
            "miou": (right / union).mean(),
            "pixel_accuracy": right.sum() / confusion.sum(),
            "class_accuracy": (right / confusion.sum(1)).mean(),
        }

    assert results["metrics"] == pytest.approx(scores(total))
    assert results["metrics"]["miou"] > 0.4
    assert results["per_class"].keys() == {"blue", "green", "red"}
    # Images drawn anew are measured from the counts that results hold of each.
    assert [row["name"] for row in results["per_image"]] == [f"val/images/room/{i}.jpg" for i in range(3)]
    drawn = resampled(results, np.array([[2, 0, 1]]))
    expected = scores(2 * by_image["0"] + by_image["2"])
    assert {name: values[0] for name, values in drawn.items()} == pytest.approx(expected)
    assert "IoU" in (tmp_path / "run" / "report.html").read_text()


def test_resume_is_exact(masks: Path, tmp_path: Path) -> None:
    options = {"drop_path": 0.2, "dice": 0.5, "optim.frozen_epochs": 1, "optim.layer_decay": 0.7}
    options |= {"checkpoint_every": 3, "encoder": "test_convnext", "accumulation": 2, "keep_checkpoints": 3}
    options |= {"data.zoom": [1, 1.5], "data.rotation": 5, "validate_every": 0}
    whole = run(masks, tmp_path / "whole", **options)
    assert whole[-1]["loss"] == pytest.approx(whole[-1]["loss_cross_entropy"] + 0.5 * whole[-1]["loss_dice"])
    rest = run(
        masks, tmp_path / "rest", **options, resume=tmp_path / "whole" / "checkpoints" / "step_0000003"
    )
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[3:]]
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "rest" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_frozen_encoder_stays_as_it_is(masks: Path, tmp_path: Path) -> None:
    save_encoder(timm.create_model("test_resnet", num_classes=0), tmp_path / "encoder")
    run(masks, tmp_path / "run", encoder=tmp_path / "encoder", frozen="true", max_steps=2)
    before, after = weights(tmp_path / "encoder"), weights(tmp_path / "run" / "model")
    assert all(torch.equal(value, after[f"encoder.{name}"]) for name, value in before.items())


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext"])  # maps from stride 2 on, and from 4 on
@pytest.mark.parametrize("decoder", ["unet", "unetpp", "fpn"])
def test_every_decoder_gives_logits_at_the_size_of_the_images(
    encoder: str, decoder: Any, tmp_path: Path
) -> None:
    model = SegmentationModel(load_encoder(encoder), ["a", "b"], decoder, image_size=SIZE).eval()
    images = torch.randn(2, 3, 40, 50)  # no multiple of the stride
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 2, 40, 50)
        assert torch.equal(load_segmentation_model(model.save(tmp_path / "model"))(images), logits)
    assert model.predict(np.zeros((30, 20, 3), np.uint8)).shape == (30, 20)


def test_void_teaches_nothing_and_weighs_nothing(masks: Path, tmp_path: Path) -> None:
    """A batch that is all void is counted, and the run goes on."""
    root = write_masks(tmp_path / "void", {"train": 4, "val": 1})
    for number in range(3):
        Image.fromarray(np.full(SIZE, 255, np.uint8)).save(
            root / "train" / "masks" / "room" / f"{number}.png"
        )
    options = {"optim.batch_size": 1, "data.crop_size": list(SIZE), "max_steps": 4}
    rows = run(root, tmp_path / "run", **options)
    assert sum(row["loss"] is None for row in rows) == 3
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "model").values())


def test_classes_of_nyu(tmp_path: Path) -> None:
    root = make_depth_world(tmp_path / "nyu", size=SIZE)
    rng = np.random.default_rng(0)
    for path in root.rglob("rgb_*.png"):
        labels = rng.integers(0, 14, SIZE).astype(np.uint8)  # 0 is void in these files
        Image.fromarray(labels).save(path.with_name(f"labels13_{path.stem.removeprefix('rgb_')}.png"))
    options = {"data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt", "data.classes": 13}
    run(root, tmp_path / "run", **options, max_steps=2)
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(results["per_class"])[::11] == ["bed", "wall"]
    truth = [np.asarray(Image.open(p)) for p in sorted((root / "val_scene").glob("labels13*"))]
    counted = sum(row["has_0"] for row in results["per_image"])
    assert counted == sum(int((one == 1).sum()) for one in truth)


def test_lists_and_palettes(masks: Path, tmp_path: Path) -> None:
    root = write_masks(tmp_path / "listed", {".": 4})
    for path in (root / "masks").rglob("*.png"):
        values = np.asarray(Image.open(path))
        coloured = Image.fromarray(values, mode="P")
        coloured.putpalette(list(range(256)) * 3)
        coloured.save(path)
        assert np.array_equal(np.asarray(Image.open(path)), values)
    lines = [f"images/room/{i}.jpg masks/room/{i}.png\n" for i in range(4)]
    (root / "train.txt").write_text("".join(lines[:3]))
    (root / "val.txt").write_text(lines[3])
    opened = open_masks(SegmentDataConfig(str(root), "train.txt", val_list="val.txt", classes=3))
    assert len(opened.train) == 3
    assert opened.held_out is not None
    assert opened.held_out.names() == ["images/room/3.jpg"]
    assert opened.pixels.sum() == 3 * (SIZE[0] - 3) * SIZE[1]


def test_the_module_is_the_command_as_a_call(masks: Path, tmp_path: Path) -> None:
    for name in ("segment", "classify"):
        assert callable(getattr(finetune, name))


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_masks(tmp_path / "masks", {"train": 2, "val": 1})
    mask = root / "train" / "masks" / "room" / "1.png"
    good = mask.read_bytes()

    def fails(**options: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(root, tmp_path / "run", **options)
        assert stopped.value.code == 2
        assert not (tmp_path / "run").exists()
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1
        return said

    assert "class 2 at row" in fails(**{"data.classes": 2})
    assert "data.classes must be" in fails(**{"data.classes": 1})
    assert "different names" in fails(**{"data.classes": '["a","a"]'})
    Image.fromarray(np.zeros((48, 60), np.uint8)).save(mask)
    assert "its mask 48x60" in fails()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(mask)
    assert "one channel" in fails()
    mask.write_bytes(good[:60])
    assert "cannot be read as a mask" in fails()
    mask.unlink()
    assert "without its mask" in fails()
    for path in (root / "val" / "masks" / "room").iterdir():
        Image.fromarray(np.full(SIZE, 255, np.uint8)).save(path)
    mask.write_bytes(good)
    assert "every pixel of the 1 masks is void" in fails()
    (tmp_path / "other").mkdir()
    other = {"data.root": tmp_path / "other"}
    assert "NYU has 13 or 40" in fails(**other, **{"data.list": "x.txt"})
    assert "expected images/NAME.jpg" in fails(**other, **{"data.kind": "masks"})
