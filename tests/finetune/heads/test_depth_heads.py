"""Every head through depth.py, evaluate.py and predict.py; two-stage training; relative depth without metres."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune import DepthModel, load_depth_model
from finetune.config import DepthConfig
from finetune.evaluate import main as evaluate
from finetune.heads import HEADS
from finetune.losses.weighted import WeightedLoss
from finetune.model.depth_model import start_from
from finetune.predict import main as predict
from finetune.protocols import get_protocol
from finetune.scoring.depth import metric_prediction, score_pair
from finetune.tasks.schedule import run_phases
from spark.model.encoder import build_encoder
from spark.training.cli import parse_config
from tests.depth_world import make_depth_world
from tests.finetune.heads.test_heads import SMALL
from tests.finetune.tasks.test_depth_training import assert_same_weights, fails, losses_of, run, weights_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_world(tmp_path_factory.mktemp("world"))


RELATIVE = [head for head, of in HEADS.items() if "depth" not in of.outputs]
"""Heads without metres."""


def options_of(head: str, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model.head": head,
        "model.head_options": json.dumps(SMALL[head]),
        "max_steps": 3,
    }
    if head in RELATIVE:
        given |= {"losses": '{"ssi": 1.0, "gradient": 0.5}', "protocol": "nyu-affine"}
    if head == "dorn":
        given |= {"losses": '{"ordinal": 1.0}'}
    return {**given, **options}


@pytest.mark.parametrize("head", HEADS)
def test_train_evaluate_predict(head: str, world: Path, tmp_path: Path) -> None:
    protocol = "nyu-affine" if head in RELATIVE else "nyu-bts-scaled"
    rows = run(world, tmp_path / "run", **options_of(head))
    assert len(rows) == 3
    assert all(np.isfinite(loss) for loss in losses_of(rows))
    model = tmp_path / "run" / "model"
    scored = json.loads((tmp_path / "run" / "evaluation.json").read_text())

    evaluate(
        [
            f"--model={model}",
            f"--data.root={world}",
            "--data.list=nyu_val.txt",
            f"--protocol={protocol}",
            f"--output={tmp_path / 'results.json'}",
            f"--figures={tmp_path / 'figures'}",
        ]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"] == scored["metrics"]
    assert results["images"] == 2
    assert (tmp_path / "figures" / "triptychs.png").is_file()

    image = world / "val_scene" / "rgb_0000.png"
    assert predict([f"--model={model}", f"--input={image}", f"--output={tmp_path / 'out'}"]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    name = "rgb_0000_disparity.npy" if head in RELATIVE else "rgb_0000.npy"
    assert {"predictions.json", "rgb_0000_colour.png", name} <= written
    assert ("rgb_0000_mm.png" in written) == (head not in RELATIVE)
    values = np.load(tmp_path / "out" / name)
    assert values.shape == (48, 64)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()


def test_linear_probe_leaves_the_encoder_alone(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "run", **options_of("linear"))
    run(world, tmp_path / "longer", **options_of("linear", max_steps=1))
    one, other = weights_of(tmp_path / "run"), weights_of(tmp_path / "longer")
    for name in one:
        if name.startswith("encoder."):
            assert torch.equal(one[name], other[name]), name
    assert not torch.equal(one["head.project.weight"], other["head.project.weight"])


def test_metric_bins_starts_from_a_core_that_learnt_relative_depth(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(world, tmp_path / "relative", **options_of("fusion"))
    core = weights_of(tmp_path / "relative")
    capsys.readouterr()
    # So short a warm-up that the first step moves hardly anything: what is saved is what it started from.
    still = {
        "max_steps": 1,
        "optim.lr": 1e-12,
        "optim.weight_decay": 0.0,
        "model.init": tmp_path / "relative" / "model",
    }
    run(world, tmp_path / "metric", **options_of("metric_bins", **still))
    said = capsys.readouterr().out
    fitting = [key for key in core if key.startswith(("encoder.", "head.core."))]
    assert f"start      {tmp_path / 'relative' / 'model'}: {len(fitting)} tensors loaded" in said
    metric = weights_of(tmp_path / "metric")
    for key in fitting:
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(metric[key], core[key], rtol=0, atol=1e-9)

    one_stage = options_of("metric_bins", **{**still, "model.init": "null"})
    run(world, tmp_path / "one_stage", **one_stage)
    other = weights_of(tmp_path / "one_stage")
    assert not torch.equal(other["head.core.reduce.weight"], core["head.core.reduce.weight"])
    # the rest of the head starts from the seed, in one stage or two
    torch.testing.assert_close(
        metric["head.bottleneck.weight"], other["head.bottleneck.weight"], rtol=0, atol=1e-9
    )


def test_a_core_that_does_not_fit_says_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = DepthModel("test_resnet", head="fusion", width=16).save(tmp_path / "core")
    same = DepthModel("test_resnet", head="metric_bins", **SMALL["metric_bins"])
    assert start_from(same, folder).missing == []
    wider = DepthModel("test_resnet", head="fusion", width=16)
    wider.head.core.relative = torch.nn.Conv2d(32, 2, 1)
    report = start_from(wider, folder)
    assert [name for name, *_ in report.mismatched] == [
        "head.core.relative.weight",
        "head.core.relative.bias",
    ]
    assert "2 have another shape" in str(report)
    with pytest.raises(ValueError, match=r"the head in .* does not fit"):
        start_from(DepthModel("test_resnet", head="fusion", width=32), folder)
    with pytest.raises(ValueError, match=r"the encoder in .* does not fit"):
        start_from(DepthModel("test_convnext", head="fusion", width=16), folder)
    with pytest.raises(
        ValueError, match=r"core has head fusion, here it is unetpp: model\.init takes the same"
    ):
        start_from(DepthModel("test_resnet", **SMALL["unetpp"]), folder)
    with pytest.raises(ValueError, match=r"set data\.mean and data\.std"):
        start_from(DepthModel("test_resnet", head="fusion", width=16, mean=(0.4,) * 3), folder)
    plain = DepthModel("test_resnet", **SMALL["unetpp"]).save(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain has head unetpp, here it is metric_bins"):
        start_from(same, plain)
    again = DepthModel("test_resnet", **SMALL["unetpp"])
    assert start_from(again, plain).missing == []
    for name, value in load_file(plain / "model.safetensors").items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"is not a depth model"):
        start_from(same, tmp_path / "nothing")


def test_relative_depth_is_not_scored_in_metres(world: Path, tmp_path: Path, capsys: Any) -> None:
    sentence = fails(world, tmp_path / "run", capsys, **options_of("fusion", protocol="nyu-bts-scaled"))
    assert "gives no metres" in sentence
    assert "nyu-affine" in sentence
    sentence = fails(world, tmp_path / "run", capsys, **options_of("fusion", losses='{"silog": 1.0}'))
    assert "'silog' scores depth, and the head gives disparity_affine" in sentence
    assert not (tmp_path / "run").exists()


def test_alignment_undoes_scale_and_shift_of_inverse_depth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(1, 8, (48, 64)).astype(np.float32)
    truth[:5, :5] = 0  # no reading
    protocol = get_protocol("nyu-affine")
    prediction = 3 / np.where(truth > 0, truth, 2.0) - 0.7
    row = score_pair(protocol, prediction, truth, inverse=True)
    assert row["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert row["delta1"] == 1
    prediction[20, 20] = np.nan
    metric = metric_prediction(protocol, prediction, truth, inverse=True)
    assert np.isfinite(metric).all()
    with_nan = score_pair(protocol, prediction, truth, inverse=True)
    assert with_nan["nonfinite"] == 1
    assert with_nan["abs_rel"] < 0.01
    constant = score_pair(protocol, np.ones((24, 32)), truth, inverse=True)
    inside = truth[truth > 0]
    assert constant["abs_rel"] == pytest.approx(
        np.mean(np.abs(1 / np.mean(1 / inside) - inside) / inside), rel=0.05
    )


def test_one_cycle_resumes_exactly(world: Path, tmp_path: Path) -> None:
    cycle = {
        "optim.schedule": "onecycle",
        "optim.rise": 0.5,
        "optim.momentum": "[0.85,0.95]",
        "optim.start_factor": 0.1,
        "optim.end_factor": 1e-3,
        "checkpoint_every": 2,
    }
    whole = run(world, tmp_path / "whole", max_steps=4, **cycle)
    assert [row["lr"] for row in whole] == pytest.approx([3e-4, 3e-3, 3e-3 * 0.5005, 3e-6], rel=1e-6)
    half = tmp_path / "whole" / "checkpoints" / "step_0000002"
    resumed = run(world, tmp_path / "resumed", max_steps=4, resume=half, **cycle)
    assert losses_of(resumed) == losses_of(whole)[2:]
    assert_same_weights(weights_of(tmp_path / "resumed"), weights_of(tmp_path / "whole"))


def test_ranking_of_pairs_through_the_loop(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one kind of supervision each, as mixed training has them: the other term is left out, not zero."""
    import finetune.tasks.depth as script

    kept = script.collate_depth
    count = []

    def alternate(samples: list[dict]) -> dict:
        batch = kept(samples)
        count.append(0)
        if len(count) % 2:
            return batch
        size = len(samples)
        pairs = torch.tensor([[[1, 2, 20, 21]]]).expand(size, 1, 4)
        known = torch.ones(size, 1, dtype=torch.bool)
        return {k: v for k, v in batch.items() if k not in ("depth", "valid")} | {
            "pairs": pairs,
            "relation": known.long(),
            "pairs_valid": known,
        }

    monkeypatch.setattr(script, "collate_depth", alternate)
    monkeypatch.setattr(
        WeightedLoss, "check", lambda *_: None
    )  # the one data set here has no pairs of its own
    rows = run(world, tmp_path / "run", losses='{"silog": 1.0, "ranking": 2.0}', max_steps=4)
    assert [set(row) & {"loss_silog", "loss_ranking"} for row in rows] == [
        {"loss_silog"},
        {"loss_ranking"},
    ] * 2
    assert rows[1]["loss"] == pytest.approx(2 * rows[1]["loss_ranking"])
    assert [row["empty_batches"] for row in rows] == [0] * 4


def test_a_model_of_before_the_heads_still_loads(tmp_path: Path) -> None:
    """The format of a saved UNet++ has not changed: these keys and no others."""
    folder = DepthModel("test_resnet", **SMALL["unetpp"]).save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert list(config) == [
        "encoder",
        "head",
        "head_options",
        "min_depth",
        "max_depth",
        "initial_depth",
        "image_size",
        "mean",
        "std",
    ]
    parts = {key.split(".")[0] + "." + key.split(".")[1] for key in load_file(folder / "model.safetensors")}
    assert {part for part in parts if part.startswith("head.")} == {"head.decoder", "head.project"}
    assert load_depth_model(folder).head_name == "unetpp"


def test_a_made_swin_is_used() -> None:
    encoder = build_encoder(
        "swinv2_tiny_window8_256",
        strict_img_size=False,
        embed_dim=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
    )
    assert DepthModel(encoder, head="linear").encoder is encoder


def test_colours_of_relative_depth_have_the_nearest_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disparity = np.linspace(0, 5, 64, dtype=np.float32)[None].repeat(32, 0)
    DepthModel("test_resnet", head="fusion", width=8, image_size=(32, 64)).save(tmp_path / "model")
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((32, 64, 3), np.uint8))
    monkeypatch.setattr("finetune.predicting.predictor.predict_images", lambda *_: [disparity])
    given = [
        f"--model={tmp_path / 'model'}",
        f"--input={tmp_path / 'photo.png'}",
        f"--output={tmp_path / 'out'}",
    ]
    assert predict([*given, "--formats=[npy,colour]"]) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["predicted"]
    assert entry["unit"] == "inverse depth up to scale and shift"
    picture = cv2.imread(str(tmp_path / "out" / "photo_colour.png"))[..., ::-1].astype(int)
    assert picture[0, -1, 0] > picture[0, -1, 2]  # red over blue where it is nearest
    assert picture[0, 0, 2] > picture[0, 0, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "photo_disparity.npy"), disparity)


CARDS = sorted((Path(__file__).resolve().parents[3] / "configs" / "depth").glob("*.yaml"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_run_cards_are_whole(card: Path) -> None:
    """Each config parses, its losses exist, and its model can be built on the encoder that it names."""
    text = card.read_text()
    named = re.search(r"^encoder: (\S+)", text, re.M) or re.search(r"--encoder ([a-z]\w+)", text)
    encoder = named[1] if named else "resnet18"
    given = ["--config", str(card), "--encoder", encoder, "--data.root", "NYU", "--output_dir", "DIR"]
    config = parse_config(DepthConfig, given, "")
    with torch.device("meta"):
        model = DepthModel(
            encoder,
            head=config.model.head,
            max_depth=config.model.max_depth,
            mean=config.data.mean,
            encoder_options=config.model.encoder_options,
            **config.model.head_options,
        )
    losses = WeightedLoss(config.losses, config.loss_options)
    entries = {"image", "depth", "valid", "labels", "pairs", "relation", "pairs_valid"}
    losses.check(entries)
    with torch.device("meta"):
        losses.attach(model)
    get_protocol(config.protocol)
    run_phases(config, 692)
    for line in ("command", "hardware", "time", "result"):
        assert re.search(rf"^# {line} ", text, re.M), line
    if card.stem == "zoedepth_swinv2":
        # without SwinV2's last norm and the unit that never runs
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 100.6
