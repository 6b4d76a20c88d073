"""spark/commands/probe.py: the vote and the linear probe on features with known answers, and the command on tiny
folders."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import timm
import torch
from PIL import Image

from spark import save_encoder
from spark.commands import probe
from spark.commands.work import probe as work
from spark.model.encoder import pyramid, pyramid_info
from spark.monitor import probes as probing
from spark.options import ProbeConfig
from spark.training.cli import parse_config
from spark.training.skipped import UnreadableImages

COLOURS = {"green": (40, 200, 60), "red": (210, 40, 50)}


def make_folder(root: Path, train: int = 5, val: int = 3, classes: dict = COLOURS) -> Path:
    """Noisy images of one colour a class, of varying sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.normal(0, 20, (40 + number, 56, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("colours"))


def run(data: Path, output: Path, *more: str, encoders: tuple[str, ...] = ("test_resnet",)) -> dict:
    small = ["--size", "64", "--k", "3", "1", "3", "--l2", "1e-3", "1", "--device", "cpu"]
    probe.main(["--encoder", *encoders, "--data", str(data), "--output", str(output), *small, *more])
    return json.loads(output.read_text())


def two_clouds(count: int, distance: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count, 8] of two classes around +-distance, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    return noise + distance * (2.0 * labels[:, None] - 1), labels


# --------------------------------------------------------------------------------------------------------------- kNN


def test_the_vote_is_weighted():
    """One neighbour straight ahead outvotes two at a right angle: exp(1 / 0.07) is much more than 2 exp(0)."""
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]).double()
    predicted = probing.knn_predict(train, labels, query, [1, 3])
    assert {k: found.tolist() for k, found in predicted.items()} == {1: [0], 3: [0]}
    # Two at 25 degrees outvote one at 20, for 2 exp(0.906 / 0.07) > exp(0.940 / 0.07); the nearest alone does not.
    angles = torch.tensor([20.0, 25.0, -25.0], dtype=torch.float64).deg2rad()
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    predicted = probing.knn_predict(train, labels, query, [1, 3])
    assert {k: found.tolist() for k, found in predicted.items()} == {1: [0], 3: [1]}


def test_the_vote_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (60,), generator=generator)
    queries = torch.randn(1100, 4, generator=generator, dtype=torch.float64)  # more than one chunk
    predicted = probing.knn_predict(train, labels, queries, [1, 7, 60])
    for k, found in predicted.items():
        assert found.shape == (1100,)
        for query, answer in list(zip(queries.numpy(), found.tolist(), strict=True))[::37]:
            votes = [0.0] * 5
            similarity = [
                float(query @ x) / math.sqrt(float(query @ query) * float(x @ x)) for x in train.numpy()
            ]
            for index in sorted(range(60), key=lambda i: -similarity[i])[:k]:
                votes[int(labels[index])] += math.exp(similarity[index] / 0.07)
            assert answer == votes.index(max(votes)), k


def test_statistics_are_those_of_the_training_split():
    train = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 0.0]])
    val = torch.tensor([[4.0, 6.0, 2.0]])
    a, b = probing.standardise(train, val)
    assert a.tolist() == [[-1, 0, 0], [1, 0, 0]]  # a constant feature is 0, not 0 / 0
    assert b.tolist() == [[2, 1, 2]]


# ------------------------------------------------------------------------------------------------------------ linear


def test_logistic_regression_reaches_the_optimum_that_scipy_finds():
    features, labels = two_clouds(80, 0.3)
    labels = (labels + (torch.arange(80) % 3 == 0)) % 3
    x, y, strength = features.numpy(), labels.numpy(), 0.01

    def objective(parameters: np.ndarray) -> float:
        weight, bias = parameters[:24].reshape(3, 8), parameters[24:]
        logits = x @ weight.T + bias
        return float(
            (scipy.special.logsumexp(logits, axis=1) - logits[np.arange(80), y]).mean()
            + strength / 2 * (weight**2).sum()
        )

    best = scipy.optimize.minimize(objective, np.zeros(27), tol=1e-12).x
    model = probing.fit_linear(features, labels, strength)
    assert max(model.n_iter_) < probing.MAX_ITERATIONS
    np.testing.assert_allclose(model.coef_, best[:24].reshape(3, 8), atol=1e-4)
    assert probing.accuracy(model, features, labels) == pytest.approx(
        ((x @ best[:24].reshape(3, 8).T + best[24:]).argmax(1) == y).mean()
    )


def test_two_classes_are_penalised_as_softmax_penalises_them():
    features, labels = two_clouds(80, 0.3)
    strength = 0.02
    x, sign = features.numpy(), 2.0 * labels.numpy() - 1

    def objective(parameters: np.ndarray) -> float:  # of w and -w, and the difference of the biases
        margins = sign * (2 * x @ parameters[:8] + parameters[8])
        return float(np.logaddexp(0, -margins).mean() + strength / 2 * 2 * (parameters[:8] ** 2).sum())

    best = scipy.optimize.minimize(objective, np.zeros(9), tol=1e-12).x
    np.testing.assert_allclose(
        probing.fit_linear(features, labels, strength).coef_[0], 2 * best[:8], atol=1e-4
    )


def linear_scores(train, train_labels, val, val_labels, seed=0):
    features, labels = torch.cat([train, val]), torch.cat([train_labels, val_labels])
    is_train = torch.arange(len(labels)) < len(train_labels)
    return probing.probe_scores(features, labels, is_train, [10, 20], seed=seed)["linear"]


def test_separable_classes_are_told_apart_and_random_labels_are_not():
    train, labels = two_clouds(100, 3.0)
    val, val_labels = two_clouds(200, 3.0, seed=1)
    assert linear_scores(train, labels, val, val_labels)["val"] == 1.0
    shuffle = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    assert 0.3 < linear_scores(train, labels[shuffle], val, val_labels)["val"] < 0.7


def test_the_strength_is_chosen_without_the_validation_split():
    train, labels = two_clouds(120, 0.2)
    val, val_labels = two_clouds(60, 0.2, seed=1)
    honest = linear_scores(train, labels, val, val_labels)
    poisoned = linear_scores(train, labels, torch.full_like(val, 1e6), 1 - val_labels)
    assert poisoned["val"] != honest["val"]
    assert {**poisoned, "val": 0} == {**honest, "val": 0}  # strength, held-out scores, training accuracy
    assert len({row["accuracy"] for row in honest["held_out"]}) > 1


def test_the_held_out_tenth_is_of_every_class_and_of_the_seed(monkeypatch):
    fitted = []

    def fit(features, labels, strength):
        fitted.append(features[:, 0].tolist())
        return original(features, labels, strength)

    original = probing.fit_linear
    monkeypatch.setattr(probing, "fit_linear", fit)
    labels = torch.tensor([0] * 30 + [1] * 50 + [2] * 2)
    features = torch.arange(82.0).double()[:, None]
    for seed in (0, 0, 1):
        probing.choose_strength(features, labels, [1.0], seed)
    held_out = [labels[sorted(set(range(82)) - {int(x) for x in rows})].tolist() for rows in fitted]
    assert held_out == [[0] * 3 + [1] * 5 + [2]] * 3
    assert fitted[0] == fitted[1] != fitted[2]


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize(("level", "strides"), [("deepest", [32]), ("8", [8]), ("all", [2, 4, 8, 16, 32])])
def test_features_are_averages_of_the_maps_in_eval_mode(folder, tmp_path, level, strides):
    options = parse_config(
        ProbeConfig,
        ["--encoder", "x", "--data", str(folder), "--output", "x", "--level", level, "--size", "64", "96"],
        "",
    )
    candidate = work.open_candidate("test_resnet", options)
    assert [each.stride for each in candidate.levels] == strides
    files = probing.list_labelled(folder).files[:3]
    features, kept = work.extract_features(
        candidate, files, UnreadableImages(3, 1.0), device=torch.device("cpu"), batch_size=2
    )
    assert kept.tolist() == [0, 1, 2]
    images = torch.stack([candidate.preparation(Image.open(file)) for file in files])
    assert images.shape == (3, 3, 64, 96)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).eval()
    with torch.no_grad():
        maps = pyramid(model, images, [each for each in pyramid_info(model) if each.stride in strides])
    torch.testing.assert_close(features, torch.cat([x.mean((2, 3)) for x in maps], 1), rtol=1e-4, atol=1e-6)


def test_preparation_keeps_the_middle_and_the_proportions():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    whole = probing.Preparation((50, 50), (0.0,) * 3, (1.0,) * 3)(image)
    assert whole.shape == (3, 50, 50)
    assert (
        whole[:, :, 1:-1].min() == 1
    )  # the middle third; of the black beside it the filter sees a pixel at most
    grey = probing.Preparation((10, 30), (0.5,), (0.25,))(image)
    assert grey.shape == (1, 10, 30)
    assert grey[0, 5, [0, 15, 29]].tolist() == [-2, 2, -2]


def test_the_first_encoder_decides_the_size_and_each_its_normalisation(folder, tmp_path):
    encoder = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    exported = save_encoder(encoder, tmp_path / "grey", mean=[0.4], std=[0.2], input_size=(64, 96))
    arguments = ["--encoder", str(exported), "test_resnet", "--data", str(folder), "--k", "1"]
    probe.main([*arguments, "--output", str(tmp_path / "probe.json"), "--l2", "1", "--device", "cpu"])
    grey, colour = json.loads((tmp_path / "probe.json").read_text())["encoders"]
    assert (grey["encoder"], grey["architecture"], grey["size"]) == (str(exported), "test_resnet", [64, 96])
    assert (grey["mean"], grey["std"]) == ([0.4], [0.2])
    assert (colour["encoder"], colour["size"], len(colour["mean"])) == ("test_resnet", [64, 96], 3)
    assert (grey["weights"], colour["weights"]) == ("loaded", "random")


# ------------------------------------------------------------------------------------------------------- the command


def test_results_and_table(folder, tmp_path, capsys):
    results = run(folder, tmp_path / "deep" / "probe.json", encoders=("test_resnet", "test_convnext"))
    assert [row["encoder"] for row in results["encoders"]] == ["test_resnet", "test_convnext"]
    row = results["encoders"][0]
    assert (row["size"], row["strides"], row["features"]) == ([64, 64], [32], 96)
    assert row["knn"] == {"1": 1.0, "3": 1.0}
    assert (row["linear"]["val"], row["linear"]["train"]) == (1.0, 1.0)
    assert row["linear"]["l2"] in (1e-3, 1)
    assert (results["classes"], results["images"]) == (["green", "red"], {"train": 10, "val": 6})
    assert (results["chance"], results["majority"], results["unreadable"]) == (0.5, 0.5, {})
    assert results["settings"]["k"] == [1, 3]
    assert results["command"].startswith("spark-probe --encoder test_resnet test_convnext --data ")
    assert set(results["versions"]) == {"python", "torch", "timm"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["probe.json"]
    printed = capsys.readouterr().out
    for word in (
        "2 classes, 10 training and 6 validation images",
        "test_convnext",
        "100.0",
        "chance 50.0",
        "widen --l2",
    ):
        assert word in printed


def test_the_same_seed_gives_the_same_results(folder, tmp_path):
    def timeless(*more: str, encoders: tuple[str, ...] = ("test_resnet",)) -> dict:
        row = run(folder, tmp_path / "probe.json", *more, encoders=encoders)["encoders"][-1]
        return {key: value for key, value in row.items() if key != "seconds"}

    first = timeless()
    assert timeless("--workers", "1", "--batch_size", "64") == first
    assert timeless(encoders=("test_convnext", "test_resnet")) == first  # whatever ran before
    assert timeless("--seed", "1") != first


def test_bf16(folder, tmp_path):
    assert run(folder, tmp_path / "probe.json", "--precision", "bf16")["encoders"][0]["linear"]["val"] == 1.0


def test_the_majority_is_that_of_the_training_split(tmp_path):
    data = make_folder(tmp_path / "data", train=3, val=2)
    (data / "val" / "red" / "1.png").unlink()
    (data / "train" / "green" / "2.png").unlink()
    results = run(data, tmp_path / "probe.json")
    assert (results["images"], results["chance"]) == ({"train": 5, "val": 3}, 0.5)
    assert results["majority"] == pytest.approx(1 / 3)


def test_a_damaged_image_is_counted_named_and_left_out(tmp_path, capsys):
    data = make_folder(tmp_path / "data", train=4, val=2)
    damaged = data / "train" / "green" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:600])
    (data / "val" / "red" / "0.png").write_text("no image")
    results = run(data, tmp_path / "probe.json", "--batch_size", "1", encoders=("test_resnet", "test_resnet"))
    assert results["images"] == {"train": 7, "val": 3}
    assert set(results["unreadable"]) == {str(damaged), str(data / "val" / "red" / "0.png")}
    printed = capsys.readouterr().out
    assert printed.count("unreadable, left out: ") == 2  # once, not once an encoder
    assert "2 unreadable images were left out" in printed


# ------------------------------------------------------------------------------------------------------------ errors


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        probe.main(["--k", "1", *arguments, "--device", "cpu"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def rename(split: str):
    return lambda data: (data / split / "red").rename(data / split / "blue")


def remove_red(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "red").rename(data / f"{split}_red")


def damage(*places: str):
    def change(data: Path) -> None:
        for place in places:
            for path in (data / place).rglob("*.png"):
                path.write_bytes(b"nothing")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data / "val").rename(data / "test"), "there is no folder"),
        (rename("train"), "same classes (only in train/: blue; only in val/: red)"),
        (remove_red, "single class, green"),
        (lambda data: Image.new("RGB", (9, 9)).save(data / "train" / "a.png"), "lies in no class"),
        (lambda data: [path.unlink() for path in data.glob("val/*/*")], "no image in"),
        (damage("."), "none of the 16 image files could be read"),
        (damage("val/red"), "val/red has no readable images, and 1 is needed"),
        (damage("train/green"), "train/green has no readable images, and 2 are needed"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(tmp_path, capsys, change, message):
    data = make_folder(tmp_path / "data")
    change(data)
    output = tmp_path / "probe.json"
    arguments = ("--encoder", "test_resnet", "--data", str(data), "--size", "32", "--output", str(output))
    assert message in error_of(capsys, *arguments)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "resnet1000"], "no model named 'resnet1000'"),
        (["--encoder", "missing/encoder"], "no encoder at missing/encoder"),
        (["--encoder", "test_resnet", "missing/encoder"], "no encoder at missing/encoder"),
        (["--encoder", "test_resnet", "--level", "64"], "has no feature map of level '64'"),
        (["--encoder", "test_resnet", "--size", "16"], "smaller than the stride"),
        (
            ["--encoder", "test_resnet", "--size", "32", "--k", "99"],
            "--k 99 is more than the 10 training images: give smaller ones, such as --k 1 2",
        ),
    ],
)
def test_wrong_options_are_said_in_one_sentence(folder, tmp_path, capsys, arguments, message):
    output = str(tmp_path / "probe.json")
    assert message in error_of(capsys, *arguments, "--data", str(folder), "--output", output)


def test_features_that_are_not_finite_are_refused(folder, tmp_path, capsys):
    encoder = timm.create_model("test_resnet", num_classes=0)
    with torch.no_grad():
        encoder.get_parameter("conv1.0.weight").fill_(torch.nan)
    exported = save_encoder(encoder, tmp_path / "diverged")
    arguments = ("--encoder", str(exported), "--data", str(folder), "--output", str(tmp_path / "probe.json"))
    assert "not finite for 16 of 16 images" in error_of(capsys, *arguments, "--size", "32")


def test_the_table_says_which_weights_are_random(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    exported = save_encoder(timm.create_model("test_resnet", num_classes=0), tmp_path / "mine")
    run(folder, tmp_path / "probe.json", encoders=("test_resnet", str(exported)))
    said = capsys.readouterr().out
    assert "test_resnet (random weights)" in said
    assert "mine (" not in said
    assert "test_resnet: random weights, a lower bound; --pretrained takes those that timm publishes" in said


def test_a_k_that_is_too_large_is_refused_before_features_are_computed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(work, "extract_features", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(SystemExit):
        probe.main(["--encoder", "test_resnet", "--data", str(folder), "--output", str(tmp_path / "p.json")])
    assert "--k 20 is more than the 10 training images" in capsys.readouterr().err
