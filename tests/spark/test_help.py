"""``--help``: every option is explained, essentials come first, and no command waits for torch to print it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import options as depth
from finetune.config import DepthConfig
from spark import options
from spark.config import PretrainConfig
from spark.options import ProbeConfig
from spark.training.help import help_text, read_options

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "spark.pretrain": PretrainConfig,
    "spark.commands.export": options.ExportConfig,
    "spark.commands.prepare": options.PrepareConfig,
    "spark.commands.probe": options.ProbeConfig,
    "finetune.depth": DepthConfig,
    "finetune.evaluate": depth.EvaluationConfig,
    "finetune.predict": depth.PredictConfig,
    "finetune.commands.app": depth.AppConfig,
    "finetune.commands.calibrate": depth.CalibrateConfig,
    "finetune.commands.compare": depth.CompareConfig,
    "finetune.commands.doctor": depth.DoctorConfig,
    "finetune.commands.export": depth.ExportDepthConfig,
}
each_command = pytest.mark.parametrize("cls", COMMANDS.values(), ids=COMMANDS)


@each_command
def test_every_option_is_explained(cls):
    for option in read_options(cls):
        assert len(option.text.split()) >= 2, option.name
    text = help_text(cls, "", "all")
    assert all(f"--{option.name}" in text or option.name == cls.POSITIONAL for option in read_options(cls))
    assert not any(raw in text for raw in ("Optional[", "Union[", "Literal[", "tuple[", "Annotated", "%("))


@each_command
def test_the_first_help_is_short_and_has_what_is_required(cls):
    every = list(read_options(cls))
    assert set(cls.ESSENTIALS) <= {option.name for option in every}
    text = help_text(cls, "", None)
    shown = re.findall(r"^  (?:--)?([a-z_.0-9]+)\b", text, re.MULTILINE)
    required = [option.name for option in every if option.required]
    assert set(shown[: len(required)]) == set(required)
    assert len(shown) < 22
    assert len(every) < 22 or "--help all" in text


def test_defaults_types_and_widths(monkeypatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = help_text(PretrainConfig, "Pretrain.", "all")
        assert max(map(len, text.splitlines())) <= columns
    text = " ".join(text.split())
    assert "(a number above 0 or null; default 5.0)" in text
    assert "(a path; default null)" in text
    assert "(a whole number above 0 or a list [...] of 2 whole numbers above 0; default 224)" in text
    assert "(one of auto, packed, masked, spconv, triton; default auto)" in text
    found = help_text(PretrainConfig, "", "mask")
    assert "--model.mask_ratio" in found
    assert "--epochs" not in found
    assert "no option is called xyz" in help_text(PretrainConfig, "", "xyz")


@pytest.mark.parametrize("module", COMMANDS)
def test_help_waits_for_no_torch(module):
    code = f"""
import sys
from {module} import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
slow = [name for name in ("torch", "timm", "numpy", "jsonargparse", "cv2", "matplotlib", "rich") if name in sys.modules]
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Help and files:" in done.stdout


def test_no_command_is_left_out():
    folders = ("spark/commands", "finetune/commands")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    assert names - {"spark.commands.report", "finetune.commands.report"} <= set(COMMANDS)
    assert all(
        hasattr(importlib.import_module(name), "main") for name in COMMANDS if name != "finetune.depth"
    )


def test_points_of_a_list_in_the_text_are_lines_of_their_own():
    text = help_text(ProbeConfig, "Two ways:\n\n- one: of\n  several words\n- other: short\n\nThe end.", None)
    assert text.startswith("Two ways:\n\n- one: of several words\n- other: short\n\nThe end.\n")
