"""spark.start: a pretraining that starts from weights, of every source, at other sizes and channels."""

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import spark.weights.encoder
from spark import SparK, load_official, save_encoder
from spark.start import start_from
from spark.training.checkpoint import save_run
from tests.spark.test_pretrain import photos, run, small_run  # noqa: F401  (photos is a fixture)
from tests.spark.training.test_checkpoint import NET18, plain_resnet, spark_style, training_file


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made(seed=1, name="test_resnet", **options):
    torch.manual_seed(seed)
    return SparK(name, **{"input_size": 64, "decoder_width": 32, **options})


def saved(model, folder):
    return save_run(folder, 3, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def differing(a, b):
    """Parts whose parameters differ between two models of equal names."""
    other = b.state_dict()
    return {key.split(".")[0] for key, value in a.state_dict().items() if not torch.equal(value, other[key])}


def test_a_run_at_another_size_with_its_decoder_or_without(tmp_path):
    old = made()
    folder = saved(old, tmp_path)
    for source in (tmp_path, folder):
        new = made(2, input_size=96, layout="masked")
        lines = start_from(new, str(source), "test_resnet")
        assert differing(new, old) == set()
        assert lines[0].startswith(f"encoder from {folder} (last weights): ")
        assert lines[1].startswith(f"decoder and densify layers from {source}: ")
    new = made(2)
    fresh = made(2)
    assert "drop" in start_from(new, str(tmp_path), "test_resnet", "drop")[1]
    assert differing(new, old) == {"densify", "decoder"}
    assert differing(new, fresh) == {"encoder"}


def test_a_decoder_that_does_not_fit_is_left_or_refused(tmp_path):
    old, new, fresh = made(), made(2, decoder_width=64), made(2, decoder_width=64)
    saved(old, tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be kept: \d+ tensors do not fit, first decoder\.\S+: \[.*there"
    ):
        start_from(made(3, decoder_width=64), str(tmp_path), "test_resnet", "keep")
    lines = start_from(new, str(tmp_path), "test_resnet")
    assert "start at random" in lines[1]
    assert differing(new, fresh) == {"encoder"}
    assert all(torch.equal(v, old.encoder.state_dict()[k]) for k, v in new.encoder.state_dict().items())


def test_other_channels_are_adapted(tmp_path):
    old = made()
    save_encoder(old.encoder, tmp_path / "encoder")
    new = made(2, in_chans=1)
    lines = start_from(new, str(tmp_path / "encoder"), "test_resnet")
    first = "conv1.0.weight"
    torch.testing.assert_close(
        new.encoder.get_parameter(first), old.encoder.get_parameter(first).sum(1, keepdim=True)
    )
    assert "could not be taken: there is none" in lines[1]
    with pytest.raises(ValueError, match="cannot be kept: there is none"):
        start_from(made(2), str(tmp_path / "encoder"), "test_resnet", "keep")


def test_an_official_file(tmp_path):
    state = spark_style(plain_resnet(**NET18), (64, 128, 256, 512), width=32, norm="bn", input_size=192)
    path = tmp_path / "official.pth"
    torch.save(training_file(state, "resnet18"), path)
    model = made(name="resnet18")
    start_from(model, str(path), "resnet18", "keep")
    assert differing(model, load_official(path)) == set()


def test_a_run_starts_from_an_official_file_at_another_size(photos, tmp_path, capsys):  # noqa: F811
    state = spark_style(plain_resnet(**NET18), (64, 128, 256, 512), width=32, norm="bn", input_size=192)
    path = tmp_path / "official.pth"
    torch.save(training_file(state, "resnet18"), path)
    options = (f"--model.init={path}", "--model.init_decoder=keep", "--model.name=resnet18", "--max_steps=2")
    still = ("--optim.base_lr=1e-30", "--optim.weight_decay=0", "--model.input_size=96")
    run(small_run(photos, tmp_path / "run", *options, *still))
    assert f"decoder and densify layers from {path}: " in capsys.readouterr().out
    started = load_official(path).state_dict()
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_0000002" / "model.safetensors")
    assert saved.keys() == started.keys()
    for key, value in saved.items():
        if "running_" not in key and "num_batches" not in key:
            torch.testing.assert_close(value, started[key], rtol=1e-5, atol=1e-7)


def test_timm_weights_are_asked_of_timm(monkeypatch):
    stock = timm.create_model("test_resnet", num_classes=0)
    asked = []

    def build(name, in_chans, pretrained=False, **options):
        asked.append((name, in_chans, pretrained))
        return stock

    monkeypatch.setattr(spark.weights.encoder, "build_encoder", build)
    model = made(2)
    assert start_from(model, "timm", "test_resnet")[0].startswith(
        "encoder from timm's weights of test_resnet: "
    )
    assert asked == [("test_resnet", 3, True)]
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in model.encoder.state_dict().items())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/place", "model.init 'no/such/place' does not exist: give a run"),
        ("", "model.init '' does not exist: give a run"),
        ("resnet50", "or timm for timm's published weights of model.name"),
        ("resnet18", "for timm's published weights of model.name say timm"),
    ],
)
def test_sources_that_are_none(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start_from(made(), source, "test_resnet")


def test_weights_of_another_encoder_are_refused_and_nothing_changes(tmp_path):
    saved(made(name="test_convnext"), tmp_path)
    model, fresh = made(), made()
    with pytest.raises(ValueError, match=r"does not fit the encoder test_resnet .*Choose the model\.name"):
        start_from(model, str(tmp_path), "test_resnet")
    assert differing(model, fresh) == set()


def test_a_run_starts_from_a_run_and_resumes_from_itself(photos, tmp_path, capsys):  # noqa: F811
    run(small_run(photos, tmp_path / "old", "--max_steps=2"))
    options = (f"--model.init={tmp_path / 'old'}", "--model.input_size=96", "--max_steps=2")
    run(small_run(photos, tmp_path / "new", *options, "--optim.base_lr=1e-30", "--optim.weight_decay=0"))
    assert "decoder and densify layers from" in capsys.readouterr().out
    name = "checkpoints/step_0000002/model.safetensors"
    old, new = load_file(tmp_path / "old" / name), load_file(tmp_path / "new" / name)
    moved = [key for key in old if "running_" not in key and "num_batches" not in key]
    for key in moved:
        torch.testing.assert_close(new[key], old[key], rtol=1e-5, atol=1e-7)
    run(small_run(photos, tmp_path / "new", *options, "--max_steps=3", "--resume=true"))
    text = capsys.readouterr().out
    assert "continuing from" in text
    assert "encoder from" not in text
