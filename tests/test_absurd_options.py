"""Absurd numbers in options of every command end in one sentence, at once: nothing starts, hangs, or is a traceback."""

import re
import typing
from types import UnionType
from typing import Annotated, Any, Union

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import depth, options
from finetune.config import ClassifyConfig, DepthConfig, SegmentConfig
from spark import options as spark_options
from spark import pretrain
from spark.config import PretrainConfig
from spark.errors import UserError, one_line_errors
from spark.training.cli import _names, read_options
from spark.training.option_types import LARGEST, Rule
from tests.depth_world import make_depth_world

COMMANDS: dict[type, list[str]] = {
    PretrainConfig: ["--model.name=resnet18", "--data.train=x", "--output_dir=o"],
    DepthConfig: ["--encoder=resnet18", "--data.root=x", "--output_dir=o"],
    ClassifyConfig: ["--encoder=resnet18", "--data.root=x", "--output_dir=o"],
    SegmentConfig: ["--encoder=resnet18", "--data.root=x", "--output_dir=o"],
    spark_options.ExportConfig: ["--checkpoint=x", "--output=o.onnx"],
    spark_options.ProbeConfig: ["--encoder=resnet18", "--data=d", "--output=o"],
    spark_options.PrepareConfig: ["--input=i", "--output=o"],
    options.EvaluationConfig: ["--model=m", "--data.root=r", "--output=o"],
    options.PredictConfig: ["--model=m", "--input=i", "--output=o"],
    options.CalibrateConfig: ["--model=m", "--output=o", "--camera=nyu"],
    options.ExportDepthConfig: ["--model=m", "--output=o.onnx"],
    options.DoctorConfig: ["p"],
    options.CompareConfig: ["a", "b"],
    options.AppConfig: ["--model=m"],
}
ABSURD = ("1e30", "-1e30", "1" + "0" * 40, "1" + "0" * 400, "nan", "inf", "-inf")


def numbers_of(kind: Any) -> int:
    """How many numbers a value of a type holds, 0 if none."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float):
        return 1
    if origin is Annotated:
        return numbers_of(parts[0])
    if origin in (tuple, list) and numbers_of(parts[0]):
        return 1 if parts[-1] is Ellipsis else len(parts)
    return max(map(numbers_of, parts), default=0) if origin in (Union, UnionType) else 0


def numeric_options() -> list[tuple[type, str, int]]:
    return [
        (cls, name, count)
        for cls in COMMANDS
        for name, kind in _names(cls)[0].items()
        if name != "time_limit" and (count := numbers_of(kind))  # a text, and any length is one
    ]


def test_every_number_of_every_command_has_ends() -> None:
    every = numeric_options()
    assert len(every) > 120
    for cls, name, count in every:
        for value in ABSURD:
            text = value if count == 1 else f"[{', '.join([value] * count)}]"
            with pytest.raises(UserError) as refused:
                read_options(cls, [*COMMANDS[cls], f"--{name}={text}"])
            assert re.search(rf"\b{re.escape(name)}\b", str(refused.value)), (cls, name, value, refused.value)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cls", "argument", "sentence"),
    [
        (PretrainConfig, "data.workers=100000", "data.workers must be at most 256, got 100000"),
        (
            PretrainConfig,
            "optim.batch_size=1e30",
            "optim.batch_size must be a whole number above 0, got 1e+30",
        ),
        (PretrainConfig, "optim.batch_size=2000000", "optim.batch_size must be at most 1000000, got 2000000"),
        (PretrainConfig, "model.input_size=[64,70000]", "model.input_size must be at most 65536, got 70000"),
        (PretrainConfig, "model.in_chans=65536", "model.in_chans must be at most 1024, got 65536"),
        (PretrainConfig, "data.std=[0,0,0]", "data.std must be a list [...] of numbers above 0 or null"),
        (DepthConfig, "losses.silog=1e30", "losses must be at most 1000000000000, got 1e+30"),
        (DepthConfig, "data.zoom=[1,1e9]", "data.zoom must be at most 1000, got 1000000000"),
        (options.AppConfig, "port=70000", "port must be at most 65535, got 70000"),
        (
            spark_options.ProbeConfig,
            "seed=1" + "0" * 30,
            "seed must be a whole number of at most 63 bits, got",
        ),
    ],
)
def test_the_sentences(cls: type, argument: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_options(cls, [*COMMANDS[cls], f"--{argument}"])


def test_a_seed_may_be_large() -> None:
    assert read_options(PretrainConfig, [*COMMANDS[PretrainConfig], f"--seed={2**62}"]).seed == 2**62
    assert Rule("", bool).most == LARGEST


@pytest.mark.parametrize(
    "options",
    [("--model.input_size=65536",), ("--optim.batch_size=1000000", "--model.input_size=512")],
)
def test_images_beyond_the_memory_are_refused_before_anything_is_written(options, tmp_path, capsys) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    base = ["--model.name=test_resnet", f"--data.train={tmp_path}", "--optim.batch_size=32"]
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([*base, f"--output_dir={tmp_path / 'run'}", "--model.decoder_width=32", *options])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "images at once of" in said
    assert "a larger accumulation" in said
    assert not (tmp_path / "run").exists()


def test_crops_beyond_the_memory_are_refused(tmp_path, capsys) -> None:
    world = make_depth_world(tmp_path / "world", train=2, val=1)
    sizes = ["--data.image_size=[65536,65536]", "--data.crop_size=[65536,65536]"]
    base = ["--encoder=test_resnet", f"--data.root={world}", "--data.list=nyu_train.txt", *sizes]
    with pytest.raises(SystemExit):
        depth.main([*base, f"--output_dir={tmp_path / 'run'}"])
    assert "32 images at once of 65536x65536 px, 3 channels, are 1649 GB" in capsys.readouterr().err


@pytest.mark.parametrize("allocate", [lambda: torch.zeros(2**50), lambda: np.zeros(2**50)])
def test_too_little_memory_is_a_sentence(allocate, capsys) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        allocate()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is too little memory (")
    assert said.count("\n") == 1


def test_a_users_error_that_is_a_runtime_error_too_stays_one_line(capsys) -> None:
    class Missing(UserError, NotImplementedError):
        pass

    with pytest.raises(SystemExit), one_line_errors():
        raise Missing("no rule")
    assert capsys.readouterr().err == "error: no rule\n"


def test_a_runtime_error_that_is_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")
