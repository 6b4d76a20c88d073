"""spark.config: the command line and YAML files become dataclasses; every mistake is one sentence."""

import errno
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

import finetune
import spark
from finetune.config import DepthConfig
from finetune.options import CompareConfig, DoctorConfig, PredictConfig
from spark.config import DataConfig, ModelConfig, PretrainConfig
from spark.errors import UserError
from spark.training.cards import find_card
from spark.training.cli import (
    call_options,
    config_changes,
    config_dict,
    parse_config,
    save_config,
    with_defaults,
)
from spark.training.option_types import Options

REQUIRED = ["--model.name", "resnet18", "--data.train", "images", "--output_dir", "out"]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def parse(*argv):
    return parse_config(PretrainConfig, list(argv), "Test.")


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_defaults_are_the_paper_recipe():
    config = parse(*REQUIRED)
    assert (config.model.name, config.data.train, config.output_dir) == ("resnet18", "images", "out")
    assert config.model.mask_ratio == 0.6
    assert (config.optim.base_lr, config.optim.batch_size, config.optim.clip_grad) == (2e-4, 4096, 5.0)
    assert (config.optim.weight_decay, config.optim.weight_decay_end) == (0.04, 0.2)
    assert (config.epochs, config.optim.warmup_epochs, config.max_steps) == (1600, 40, None)
    assert config.optim.betas is None


def test_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {name: resnet50, input_size: [96, 128]}\noptim:\n  base_lr: 1e-3\n  betas: [0.9, 0.95]\n"
    )
    config = parse(
        "--config",
        str(file),
        "--data.train=x",
        "--output_dir",
        "o",
        "--optim.base_lr",
        "2e-3",
        "--resume",
        "true",
    )
    assert config.model.input_size == (96, 128)
    assert config.optim.base_lr == 2e-3
    assert config.optim.betas == (0.9, 0.95)
    assert config.resume is True


def test_resume_takes_a_path():
    path = "runs/a/checkpoints/step_0000010"
    assert parse(*REQUIRED, "--resume", path).resume == path
    assert parse(*REQUIRED, "--resume", "false").resume is False


def test_saved_config_reads_back(tmp_path):
    config = parse(
        *REQUIRED, "--optim.betas", "[0.9, 0.99]", "--optim.eps", "1e-9", "--data.mean", "[0.1,0.2,0.3]"
    )
    save_config(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config_dict(config)


def test_home_folder_is_expanded_in_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: resnet18}\ndata: {train: ~/images}\noutput_dir: ~/out\nresume: ~/old\n")
    config = parse("--config", str(file))
    assert config.data.train == str(tmp_path / "images")
    assert config.output_dir == str(tmp_path / "out")
    assert config.resume == str(tmp_path / "old")


def test_print_config(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*REQUIRED, "--print_config")
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["batch_size"] == 4096


def test_lists_as_several_values_and_true_by_the_name_alone():
    config = parse(*REQUIRED, "--model.input_size", "96", "128", "--resume", "--data.mean", "0.5")
    assert (config.model.input_size, config.resume, config.data.mean) == ((96, 128), True, (0.5,))
    assert parse(*REQUIRED, "--model.input_size", "96").model.input_size == 96
    config = parse_config(
        PredictConfig, ["--model", "m", "--input", "i", "--output", "o", "--formats", "npy", "ply"], ""
    )
    assert config.formats == ["npy", "ply"]


def test_positional_values():
    assert parse_config(CompareConfig, ["a.json", "b.json", "--images", "3"], "").results == [
        "a.json",
        "b.json",
    ]
    assert parse_config(CompareConfig, ["--output", "c.csv", "a.json", "b.json"], "").results == [
        "a.json",
        "b.json",
    ]
    assert parse_config(DoctorConfig, ["NYU", "--list", "x.txt"], "").path == "NYU"


def test_calls_from_python(tmp_path):
    card = CONFIGS / "pretrain" / "small.yaml"
    options = {
        "data": tmp_path,
        "model": "resnet50",
        "output_dir": "o",
        "optim": {"batch_size": 8, "betas": [0, 0.9]},
    }
    called = call_options(PretrainConfig, {**options, "config": "small", "optim.eps": 1e-3})
    given = ["--data.train", str(tmp_path), "--model.name=resnet50", "--output_dir=o", "--optim.batch_size=8"]
    assert called == parse("--config", str(card), *given, "--optim.betas=[0,0.9]", "--optim.eps=1e-3")
    with pytest.raises(UserError, match=r"optim\.batch_size must be a whole number above 0, got 0"):
        spark.pretrain(**{**options, "optim": {"batch_size": 0}})
    with pytest.raises(UserError, match=r"did you mean model\.name"):
        spark.pretrain(**{**options, "model": {"nam": "resnet50"}})
    with pytest.raises(UserError, match="output_dir must be set"):
        spark.pretrain(data="x", model="resnet50")
    with pytest.raises(UserError, match=r"encoder must be set"):
        finetune.depth(data="NYU", output_dir="o")
    assert spark.pretrain.main is spark.pretrain.__dict__["main"], "it is the module, too"


def test_cards_by_name(capsys, tmp_path, monkeypatch):
    assert parse("--config", "small", "--data.train", "x", "--output_dir", "y").model.decoder_width == 256
    text = error_of(capsys, *REQUIRED, "--config", "smal")
    assert "there is no config file smal" in text
    assert "did you mean small?" in text
    monkeypatch.chdir(tmp_path)
    Path("small").write_text("seed: 3\n")
    assert parse(*REQUIRED, "--config", "small").seed == 3, "a file of that name comes first"
    assert find_card("unetpp_nyu", "depth").is_file()


def test_options_of_older_runs_still_parse(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data: {root: x, cache: true}\nencoder: resnet18\noutput_dir: y\n")
    assert parse_config(DepthConfig, ["--config", str(file)], "").data.root == "x"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--optim.bas_lr", "did you mean optim.base_lr?"),
        ("--base_lr", "did you mean optim.base_lr?"),
        ("--lr", "did you mean optim.base_lr?"),
        ("--batch_size", "did you mean optim.batch_size?"),
        ("--modle.name", "did you mean model.name?"),
        ("--model.mask", "did you mean model.mask_ratio?"),
        ("--max_step", "did you mean max_steps?"),
        ("--optim.frobnicate", "optim has name, batch_size"),
        ("--frobnicate", "--help lists all options"),
    ],
)
def test_unknown_option_names_the_nearest(capsys, argument, words):
    text = error_of(capsys, *REQUIRED, argument, "3")
    assert f"unknown option {argument}" in text
    assert words in text


def test_unknown_key_in_file_names_path_and_nearest(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  batch_sise: 8\n")
    text = error_of(capsys, *REQUIRED, "--config", str(file))
    assert "unknown option optim.batch_sise" in text
    assert str(file) in text
    assert "did you mean optim.batch_size?" in text
    file.write_text("epoch: 8\n")
    assert "unknown option epoch in" in error_of(capsys, *REQUIRED, "--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.base_lr", "abc"], "optim.base_lr must be a number above 0, got abc"),
        (["--seed", "1.5"], "seed must be a whole number of at most 63 bits, got 1.5"),
        (
            ["--model.input_size", "[1, 2, 3]"],
            "model.input_size must be a whole number above 0 or a list [...] of 2 whole numbers above 0",
        ),
        (
            ["--optim.betas", "0.9"],
            "optim.betas must be a list [...] of 2 numbers of at least 0 and below 1 or null, got [0.9]",
        ),
        (["--model.sync_bn", "3"], "model.sync_bn must be true or false, got 3"),
        (
            ["--model.layout", "dense"],
            "model.layout must be one of auto, packed, masked, spconv, triton, got dense",
        ),
        (["--precision", "fp8"], "precision must be one of fp32, bf16, fp16, got fp8"),
        (["--optim.clip_grad", "x"], "optim.clip_grad must be a number above 0 or null, got x"),
        (["--optim", "fast"], "optim.name must be one of"),
        (["stray"], "unexpected argument stray"),
        (["--config"], "--config needs a value"),
        (["--epochs"], "--epochs needs a value: a number above 0"),
        (["--config", "no/such/file.yaml"], "there is no config file no/such/file.yaml"),
        (["--model.mask_ratio", "1.5"], "model.mask_ratio must be a number between 0 and 1 or a list"),
        (["--optim.base_lr", "0"], "optim.base_lr must be a number above 0, got 0\n"),
        (["--optim.clip_grad", "0"], "optim.clip_grad must be a number above 0 or null, got 0"),
        (
            ["--optim.weight_decay_end", "-1"],
            "optim.weight_decay_end must be a number of at least 0 or null, got -1",
        ),
        (["--data.crop_scale", "[0.9, 0.5]"], "data.crop_scale must be"),
        (["--accumulation", "0"], "accumulation must be a whole number above 0, got 0"),
        (["--epochs", "0"], "epochs must be a number above 0, got 0"),
        (["--data.train", ""], "data.train must be a path, got an empty text"),
        (["--output_dir", ""], "output_dir must be a path, got an empty text"),
        (["--epochs", ".inf"], "epochs must be a finite number, got inf"),
        (["--optim.base_lr", ".inf"], "optim.base_lr must be a finite number, got inf"),
        (["--data.std", "[1, .inf, 1]"], "data.std must be a finite number, got inf"),
        (["--data.mean", "[.nan, 1, 1]"], "data.mean must be a finite number, got nan"),
        (
            ["--data.crop_scale", "[0, 1]"],
            "2 numbers above 0 and at most 1 with the lower one first, got [0, 1]",
        ),
        (
            ["--model.mask_ratio", "[0.7, 0.5]"],
            "2 numbers between 0 and 1 with the lower one first, got [0.7, 0.5]",
        ),
        (
            ["--model.init_decoder", "keep"],
            "model.init_decoder must be auto where model.init names no weights, got keep",
        ),
        (["--seed", str(2**63)], "seed must be a whole number of at most 63 bits, got 9223372036854775808"),
    ],
)
def test_wrong_value(capsys, arguments, words):
    assert words in error_of(capsys, *REQUIRED, *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim: {base_lr: fast}\n", "optim.base_lr must be a number above 0, got fast"),
        ("optim: 3\n", "optim in"),
        ("optim:\n", "must hold options (name, batch_size"),
        ("", "must hold options (output_dir"),
        ("model: {name: x\n", "is not valid YAML"),
        ("- a\n", "must hold options"),
    ],
)
def test_bad_file(capsys, tmp_path, content, words):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert words in error_of(capsys, *REQUIRED, "--config", str(file))


def test_missing_options_are_named(capsys):
    text = error_of(capsys, "--model.name", "resnet18")
    assert "output_dir and data.train must be set" in text
    assert "--data.train VALUE; --config NAME reads a run card, one of " in text


def test_a_group_alone_is_its_first_option():
    config = parse("--model", "resnet18", "--data=photos", "--output_dir", "runs/x")
    assert (config.model.name, config.data.train) == ("resnet18", "photos")
    config = parse("--model", "{name: resnet18, decoder_width: 64}", "--data", "photos", "--output_dir", "x")
    assert (config.model.name, config.model.decoder_width) == ("resnet18", 64)


def test_only_the_main_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        parse("--nonsense", "1")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


@dataclass
class HeadConfig:
    """Head.

    Attributes:
        name: kind of head.
    """

    name: str = "unetpp"


@dataclass
class OtherConfig(Options):
    """Run.

    Attributes:
        encoder: where the encoder is.
        head: the head.
    """

    encoder: str | None = None
    head: HeadConfig = field(default_factory=HeadConfig)


def test_any_dataclass():
    config = parse_config(OtherConfig, ["--encoder", "runs/a/encoder", "--head.name", "dorn"], "Other.")
    assert config == OtherConfig("runs/a/encoder", HeadConfig("dorn"))


def parse_depth(*argv):
    required = ["--encoder", "resnet18", "--data.root", "x", "--output_dir", "y"]
    return parse_config(DepthConfig, [*required, *argv], "Depth.")


def test_entries_of_an_option_that_is_a_dict():
    config = parse_depth(
        "--losses.l1",
        "0.5",
        "--model.head_options.decoder_channels",
        "[16,16,8,8,8]",
        "--loss_options.silog.a=1",
    )
    assert config.losses == {"silog": 1.0, "l1": 0.5}, "entries are added; the whole option replaces"
    assert parse_depth("--losses", "{l1: 0.5}").losses == {"l1": 0.5}
    assert config.model.head_options == {"decoder_channels": [16, 16, 8, 8, 8]}
    assert config.loss_options == {"silog": {"a": 1}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--losses", "3"], "losses must be {name: a number, ...} of silog, l1"),
        (["--losses.l1", "abc"], "losses must be {name: a number, ...} of silog, l1"),
        (["--model.head_options", "3"], "model.head_options must be {name: any value, ...}, got 3"),
        (["--loss_options", "3"], "loss_options must be {name: {name: any value, ...}, ...}, got 3"),
        (["--losses.", "3"], "unknown option --losses."),
    ],
)
def test_wrong_dict(capsys, arguments, words):
    with pytest.raises(SystemExit):
        parse_depth(*arguments)
    assert f"error: {words}" in capsys.readouterr().err


def test_a_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    save_config(HeadConfig("old"), tmp_path / "config.yaml")

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"the disk is full, .*config\.yaml was not written"):
        save_config(HeadConfig("new"), tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"name": "old"}


@pytest.mark.parametrize(
    "file",
    sorted(path for path in (CONFIGS / "pretrain").glob("*.yaml") if not path.is_symlink()),
    ids=lambda path: path.stem,
)
def test_configs_are_run_cards_that_parse(file):
    config = parse("--config", str(file), "--data.train", "x", "--output_dir", "y")
    if file.stem == "small":
        assert config.optim.betas is None, "for any encoder: a ResNet's betas would be wrong for a ConvNeXt"
    else:
        assert config.optim.betas is not None, "the recipes say their betas"
    assert config.optim.batch_size % config.accumulation == 0
    text = file.read_text()
    for word in ("# Command", "# Hardware", "# Time", "# Expected", f"--config {file.stem}"):
        assert word in text


# The paper's recipe (Tian et al., ICLR 2023, and its code): the same for all networks but for these two.
OFFICIAL = {  # network: drop path, beta2
    "resnet50": (0.05, 0.95),
    "resnet101": (0.08, 0.95),
    "resnet152": (0.10, 0.95),
    "resnet200": (0.15, 0.95),
    "convnext_small": (0.2, 0.999),
    "convnext_base": (0.3, 0.999),
    "convnext_large": (0.4, 0.999),
}


def test_official_recipes():
    files = sorted((CONFIGS / "pretrain").glob("official_*.yaml"))
    assert {file.stem.removeprefix("official_") for file in files} == set(OFFICIAL)
    for file in files:
        config = parse("--config", str(file), "--data.train", "x", "--output_dir", "y")
        model, data, optim = config.model, config.data, config.optim
        assert model.name == file.stem.removeprefix("official_")
        drop_path, beta2 = OFFICIAL[model.name]
        assert (model.drop_path, optim.betas) == (drop_path, (0.9, beta2))
        assert (model.input_size, model.mask_ratio, model.decoder_width) == (224, 0.6, 768)
        plain = parse("--model.name", model.name, "--data.train", "x", "--output_dir", "y")
        official = ("name", "drop_path")
        assert {k: v for k, v in vars(model).items() if k not in official} == {
            k: v for k, v in vars(plain.model).items() if k not in official
        }, "all other options of the model are the paper's by default"
        assert (data.crop_scale, data.hflip, data.mean, data.std) == ((0.67, 1.0), 0.5, None, None)
        assert (optim.name, optim.batch_size, optim.eps, optim.clip_grad) == ("lamb", 4096, 1e-6, 5.0)
        assert optim.base_lr * optim.batch_size / 256 == pytest.approx(2e-4 * 4096 / 256)
        assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.2)
        assert (config.epochs, optim.warmup_epochs, optim.warmup_steps, config.max_steps) == (
            1600,
            40,
            None,
            None,
        )
        assert optim.batch_size % (8 * config.accumulation) == 0, "the card's 8 GPUs"
        micro = optim.batch_size // 8 // config.accumulation
        assert f"{micro} images at once" in file.read_text()
        assert f"1 GPU: {8 * config.accumulation})" in file.read_text()


@pytest.mark.parametrize("file", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_known_to_accelerate(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert vars(config)["num_processes"] in (1, 2, 8, 16)


def test_changes_between_two_configs_are_named():
    before = {"a": 1, "b": {"c": [1, 2], "gone": 3, "text": "x", "on": True}, "resume": False}
    now = {"a": 1, "b": {"c": [1, 3], "text": "y z", "on": False, "new": 4}, "resume": True}
    assert config_changes(before, now) == [
        "b.c was [1, 2], is [1, 3]",
        "b.gone was 3, is null",
        "b.text was x, is y z",
        "b.on was true, is false",
        "b.new was null, is 4",
    ]
    assert config_changes(before, before) == []


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [(None, math.inf), (0.5, 1800), ("2", 7200), ("1.5", 5400), ("00:10:05", 605), ("100:00:00", 360000)],
)
def test_time_limit(limit, seconds):
    config = PretrainConfig(
        model=ModelConfig("resnet18"), data=DataConfig("x"), output_dir="y", time_limit=limit
    )
    assert config.time_limit_seconds() == seconds


@pytest.mark.parametrize("limit", ["soon", "-1", "0", 0.0, "1:99:00", "10:00", 43200.0])
def test_time_limit_that_is_none(limit):
    with pytest.raises(
        ValueError, match=r"time_limit must be null, a number of hours above 0, or HH:MM:SS \(in a YAML"
    ):
        PretrainConfig(model=ModelConfig("resnet18"), data=DataConfig("x"), output_dir="y", time_limit=limit)


def test_an_average_that_is_not_kept_cannot_be_exported():
    with pytest.raises(ValueError, match=r"export_ema must be false where optim\.ema_decay is null"):
        PretrainConfig(model=ModelConfig("resnet18"), data=DataConfig("x"), output_dir="y", export_ema=True)


def test_older_configs_are_compared_as_this_version_writes_them():
    before = {
        "model": {"name": "resnet18"},
        "data": {"train": "x", "gone": 1},
        "output_dir": "y",
        "epochs": 5,
    }
    now = config_dict(parse("--model.name=resnet18", "--data.train=x", "--output_dir=y"))
    assert config_changes(with_defaults(PretrainConfig, before), now) == ["epochs was 5, is 1600"]


def test_a_card_of_the_other_command_is_named(capsys, tmp_path):
    said = error_of(capsys, *REQUIRED, "--config", "unetpp_nyu")
    assert "unetpp_nyu is a card of spark-depth, not of spark-pretrain" in said
    for file in (CONFIGS / "depth").glob("*.yaml"):
        said = error_of(capsys, *REQUIRED, "--config", str(file))
        assert re.search(r"\.yaml is of spark-depth \(it has [\w.]+\), and this is spark-pretrain", said)
    for file in (CONFIGS / "pretrain").glob("*.yaml"):
        with pytest.raises(SystemExit):
            parse_config(DepthConfig, ["--config", str(file)], "")
        assert "is of spark-pretrain (it has " in capsys.readouterr().err


def test_an_option_without_a_group_is_found_from_a_group(capsys):
    with pytest.raises(SystemExit):
        parse_config(DepthConfig, ["--model.encoder", "resnet18"], "")
    assert "unknown option --model.encoder; did you mean encoder?" in capsys.readouterr().err
    assert "did you mean epochs?" in error_of(capsys, *REQUIRED, "--optim.epochs", "3")
