"""layout="auto": what a table of measurements says, who asks it, how it is written. The tables here are made up."""

import csv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import spark.model.spark
from spark import SparK, pretrain
from spark.sparse import LAYOUTS, choice
from spark.sparse.choice import Choice, choose_layout, convolution_kind
from spark.training.log import read_rows
from tools.benchmarks.steps import MEASURED

IN_TABLE = "spark/sparse/measured.csv"
UNMEASURED = f"auto: not yet measured on cuda; {IN_TABLE}"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Puts a table in the place of the committed one: rows of (columns=values, layout=speed-up)."""

    def write(*rows):
        lines = [
            ",".join((*ROW, "layout", "speedup_median")),
            *(
                ",".join((*(str(row[c]) for c in ROW), layout, str(row[layout])))
                for row in ({**ROW, **row} for row in rows)
                for layout in ("masked", "packed", "spconv", "triton")
                if layout in row
            ),
        ]
        path = tmp_path / "measured.csv"
        path.write_text("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(choice, "MEASURED", path)

    return write


ROW = {
    "device": "another cpu",
    "device_type": "cpu",
    "model": "resnet50",
    "convolutions": "dense",
    "precision": "fp32",
    "batch": 4,
    "height": 192,
    "mask_ratio": 0.6,
}


@pytest.fixture
def missing(monkeypatch):
    """Makes layouts' packages missing, all others present."""

    def those(*names):
        def refuse():
            raise ValueError("its package is missing")

        for layout in ("spconv", "triton"):
            monkeypatch.setitem(LAYOUTS, layout, refuse if layout in names else LAYOUTS["packed"])

    return those


# --------------------------------------------------------------------------------------------------- reading the table


def test_the_fastest_and_why(table):
    table({"masked": 1.0, "packed": 2.94})
    assert choose_layout("cpu", "dense", "fp32", 0.6) == Choice(
        "packed",
        f"auto: 2.9x the masked layout on cpu, fp32, mask ratio 0.6, resnet50 at 192 px, batch 4; {IN_TABLE}",
    )
    table({"masked": 1.0, "packed": 0.9})
    assert choose_layout("cpu", "dense", "fp32", 0.6) == Choice(
        "masked",
        f"auto: the fastest layout on cpu, fp32, mask ratio 0.6, resnet50 at 192 px, batch 4; {IN_TABLE}",
    )


def test_another_device_says_nothing(table):
    table({"masked": 1.0, "packed": 0.5})
    assert choose_layout("cuda", "dense", "fp32", 0.6) == Choice("packed", UNMEASURED)
    table()
    assert choose_layout("cpu", "dense", "fp32", 0.6) == Choice("packed", UNMEASURED.replace("cuda", "cpu"))


@pytest.mark.parametrize(
    ("asked", "layout", "said"),
    [
        (0.2, "masked", "0.3"),
        (0.44, "masked", "0.3"),
        (0.46, "packed", "0.6"),
        (0.99, "packed", "0.9"),
        (0.45, "packed", "0.3 and 0.6"),  # median of 0.5 and 2.0
        (0.75, "packed", "0.6 and 0.9"),
    ],
)
def test_nearest_mask_ratio(table, asked, layout, said):
    table(
        {"mask_ratio": 0.3, "masked": 1.0, "packed": 0.5},
        {"mask_ratio": 0.6, "masked": 1.0, "packed": 2.0},
        {"mask_ratio": 0.9, "masked": 1.0, "packed": 3.0},
    )
    chosen = choose_layout("cpu", "dense", "fp32", asked)
    assert chosen.layout == layout
    assert f", mask ratio {said}, resnet50 at 192 px, batch 4;" in chosen.reason


def test_precision_and_kind_are_kept_to_where_measured(table):
    table(
        {"masked": 1.0, "packed": 3.0},
        {"precision": "bf16", "masked": 1.0, "packed": 0.5},
        {"convolutions": "grouped", "model": "convnext_tiny", "masked": 1.0, "packed": 4.0},
    )
    assert choose_layout("cpu", "dense", "fp32", 0.6).reason.startswith("auto: 3.0x the masked layout")
    assert choose_layout("cpu", "dense", "bf16", 0.6).layout == "masked"
    assert choose_layout("cpu", "dense", "fp16", 0.6) == Choice(  # median of 3.0 and 0.5
        "packed",
        f"auto: 1.8x the masked layout on cpu, fp32 and bf16, mask ratio 0.6, resnet50 at 192 px, batch 4; {IN_TABLE}",
    )
    # the kind before the precision: bf16 was not measured for grouped convolutions
    assert choose_layout("cpu", "grouped", "bf16", 0.6) == Choice(
        "packed",
        f"auto: 4.0x the masked layout on cpu, fp32, mask ratio 0.6, convnext_tiny at 192 px, batch 4; {IN_TABLE}",
    )


def test_ones_own_machine_decides_where_it_was_measured(table, monkeypatch):
    mine = {"device": choice.device_name("cpu")}
    table({"masked": 1.0, "packed": 3.0}, {**mine, "masked": 1.0, "packed": 0.8})
    chosen = choose_layout("cpu", "dense", "fp32", 0.6)
    assert chosen.layout == "masked"
    assert "the fastest layout on this cpu, fp32" in chosen.reason
    monkeypatch.setattr(choice, "device_name", lambda device_type: "a third cpu")
    assert choose_layout("cpu", "dense", "fp32", 0.6).reason.startswith("auto: 1.9x the masked layout on cpu")


def test_median_over_models(table):
    table(
        {"model": "resnet18", "masked": 1.0, "packed": 0.2},
        {"model": "resnet34", "masked": 1.0, "packed": 1.5},
        {"model": "resnet50", "masked": 1.0, "packed": 1.25},
    )
    assert choose_layout("cpu", "dense", "fp32", 0.6) == Choice(
        "packed",
        "auto: 1.2x the masked layout on cpu, fp32, mask ratio 0.6, resnet18 and resnet34 and resnet50 at 192 px, "
        "batch 4; " + IN_TABLE,
    )


def test_a_missing_package_is_no_candidate(table, missing):
    table({"device_type": "cuda", "masked": 1.0, "packed": 2.0, "spconv": 3.0, "triton": 4.0})
    missing()
    assert choose_layout("cuda", "dense", "fp32", 0.6).layout == "triton"
    missing("triton")
    assert choose_layout("cuda", "dense", "fp32", 0.6).layout == "spconv"
    missing("triton", "spconv")
    assert choose_layout("cuda", "dense", "fp32", 0.6).layout == "packed"
    table({"device_type": "cuda", "triton": 4.0})
    assert choose_layout("cuda", "dense", "fp32", 0.6) == Choice("packed", UNMEASURED)


def test_packages_of_other_devices_are_not_imported(table, monkeypatch):
    table({"masked": 1.0, "packed": 2.0}, {"device_type": "cuda", "masked": 1.0, "spconv": 3.0})
    monkeypatch.setitem(LAYOUTS, "spconv", lambda: pytest.fail("imported for nothing"))
    assert choose_layout("cpu", "dense", "fp32", 0.6).layout == "packed"


def test_of_equals_the_one_that_needs_least(table, missing):
    missing()
    table({"masked": 1.0, "packed": 1.0, "spconv": 1.0, "triton": 1.0})
    assert choose_layout("cpu", "dense", "fp32", 0.6).layout == "packed"
    table({"masked": 1.0, "packed": 0.9, "spconv": 1.0, "triton": 1.0})
    assert choose_layout("cpu", "dense", "fp32", 0.6).layout == "masked"
    table({"masked": 1.0, "packed": 0.9, "spconv": 1.1, "triton": 1.1})
    assert choose_layout("cpu", "dense", "fp32", 0.6).layout == "spconv"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "dense"),
        ("resnet50", "dense"),
        ("resnext50_32x4d", "grouped"),
        ("convnext_atto", "grouped"),
        ("mobilenetv3_small_050", "grouped"),
    ],
)
def test_kinds_of_encoders(name, kind):
    assert convolution_kind(timm.create_model(name)) == kind


def test_the_committed_table():
    assert Path(__file__).resolve().parents[3] / IN_TABLE == choice.MEASURED
    with choice.MEASURED.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == MEASURED
        for row in reader:
            assert row["device_type"] in ("cpu", "cuda")
            assert row["layout"] in LAYOUTS
            assert row["precision"] in ("fp32", "bf16")
            assert row["convolutions"] in ("dense", "grouped")
            assert 0 < float(row["mask_ratio"]) < 1
            assert float(row["speedup_median"]) > 0


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.fixture
def layouts_run(monkeypatch):
    """Names of the layouts that models run in."""
    names = []
    sparsify = spark.model.spark.sparsify

    def note(images, visible, layout, *options):
        names.append(layout)
        return sparsify(images, visible, layout, *options)

    monkeypatch.setattr(spark.model.spark, "sparsify", note)
    return names


def test_a_model_asks_in_its_forward(table, layouts_run):
    table(
        {"masked": 1.0, "packed": 0.5},
        {"precision": "bf16", "masked": 1.0, "packed": 2.0},
        {"mask_ratio": 0.9, "masked": 1.0, "packed": 2.0},
    )
    torch.manual_seed(0)
    model = SparK("test_resnet", 64, mask_ratio=0.5, decoder_width=32, layout="auto").eval()
    packed = SparK("test_resnet", 64, mask_ratio=0.5, decoder_width=32).eval()
    packed.load_state_dict(model.state_dict())
    images, visible = torch.randn(2, 3, 64, 64), torch.eye(2).bool().expand(2, 1, 2, 2)
    loss = model(images, visible).loss
    assert layouts_run == ["masked"]
    assert loss.item() == pytest.approx(packed(images, visible).loss.item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        model(images, visible)
    assert layouts_run == ["masked", "packed", "packed"]
    assert model.layout == "auto"
    assert model.layout_on("cuda", "fp32") == Choice("packed", UNMEASURED)


def test_a_model_asks_once(table, layouts_run):
    table({"masked": 1.0, "packed": 0.5})
    model = SparK("test_resnet", 64, mask_ratio=0.5, decoder_width=32, layout="auto")
    model(torch.zeros(2, 3, 64, 64))
    table({"masked": 1.0, "packed": 2.0})
    model(torch.zeros(2, 3, 64, 64))
    assert layouts_run == ["masked", "masked"]


def test_a_named_layout_asks_nobody(table, layouts_run, missing):
    table({"masked": 1.0, "packed": 9.0})
    model = SparK("test_resnet", 64, mask_ratio=0.5, decoder_width=32, layout="masked")
    model(torch.zeros(2, 3, 64, 64))
    assert layouts_run == ["masked"]
    assert model.layout_on("cpu", "fp32") == Choice("masked", "as named")
    missing("triton")
    with pytest.raises(ValueError, match="its package is missing"):
        SparK("test_resnet", 64, layout="triton")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def train(tmp_path, capsys):
    """Runs a small pretraining from the command line; returns what it printed."""
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = random.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    options = {
        "model.name": "test_resnet",
        "model.input_size": "64",
        "model.decoder_width": "32",
        "data.train": str(tmp_path / "photos"),
        "data.workers": "0",
        "optim.batch_size": "2",
        "optim.warmup_steps": "0",
        "log_every": "1",
        "panels_every": "0",
        "output_dir": str(tmp_path / "run"),
    }

    def run(steps, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        pretrain.main([f"--{k}={v}" for k, v in options.items()] + [f"--max_steps={steps}", *more])
        return capsys.readouterr().out

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_training_says_what_it_picked(table, train, tmp_path, layouts_run):
    table({"masked": 1.0, "packed": 0.5}, {"precision": "bf16", "masked": 1.0, "packed": 1.25})
    said = (
        "layout     packed (auto: 1.2x the masked layout on cpu, bf16, mask ratio 0.6, resnet50 at 192 px, batch 4; "
        + IN_TABLE
    )
    assert train(2, "--precision=bf16").count(said) == 1
    assert set(layouts_run) == {"packed"}  # in the trial forward and the panels, too, which run in fp32
    assert [row["layout"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == ["packed", "packed"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["layout"] == "auto"


def test_training_in_a_named_layout(train, tmp_path):
    assert "layout     masked (as named)\n" in train(1, "--model.layout=masked")
    assert [row["layout"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == ["masked"]


def test_what_cannot_be_compiled_is_refused_before_anything_is_written(
    table, train, tmp_path, missing, capsys
):
    table({"masked": 1.0, "packed": 2.0, "triton": 3.0})
    missing()
    with pytest.raises(SystemExit):
        train(1, "--compile=true")
    assert "compile cannot trace the layout triton (auto: 3.0x the masked layout" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_layout(table, train, layouts_run):
    table({"masked": 1.0, "packed": 0.5})
    train(1)
    table({"masked": 1.0, "packed": 2.0})  # measured anew in between
    text = train(2, "--resume=true")
    assert "layout     masked (auto: as before in this run)\n" in text
    assert "changed since that checkpoint: the layout" not in text
    assert set(layouts_run) == {"masked"}
    text = train(3, "--resume=true", "--model.layout=packed")
    assert "changed since that checkpoint: model.layout was auto, is packed\n" in text
    assert "changed since that checkpoint: the layout was masked on cpu, is packed on cpu" in text


def test_a_run_that_moved_to_another_device_chooses_again(table, train, tmp_path, layouts_run):
    table({"masked": 1.0, "packed": 0.5})
    train(1)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = torch.load(folder / "state.pt", weights_only=True)
    state["extra"] |= {"layout": "triton", "device_type": "cuda"}
    torch.save(state, folder / "state.pt")
    (folder / "SHA256SUMS").unlink()
    text = train(2, "--resume=true")
    assert "changed since that checkpoint: the layout was triton on cuda, is masked on cpu: from here" in text
    assert [row["layout"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == ["masked", "masked"]
    assert set(layouts_run) == {"masked"}


@pytest.mark.parametrize(("named", "changed"), [("packed", False), ("masked", True)])
def test_a_checkpoint_that_does_not_say_where_it_ran(train, tmp_path, named, changed):
    """Older ones do not: their config names the layout that they ran in."""
    train(1, f"--model.layout={named}")
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = torch.load(folder / "state.pt", weights_only=True)
    for key in ("layout", "device_type"):
        del state["extra"][key]
    torch.save(state, folder / "state.pt")
    (folder / "SHA256SUMS").unlink()
    text = train(2, "--resume=true", "--model.layout=packed")
    assert ("the layout was masked on cpu, is packed on cpu" in text) == changed
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_package_that_went_missing(table, train, tmp_path, missing):
    table({"masked": 1.0, "packed": 2.0, "spconv": 3.0})
    missing()
    train(1)
    missing("spconv")
    text = train(2, "--resume=true")
    assert "changed since that checkpoint: the layout was spconv on cpu, is packed on cpu" in text


# --------------------------------------------------------------------------------------------------- writing the table


@pytest.fixture
def torch_as_before():
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn
