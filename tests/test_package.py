"""The wheel, built and installed alone, away from the clone; and the ways to start the entries."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.depth_world import make_depth_world

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = re.findall(r'^(spark-[\w-]+) = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

USER = """
import sys
from importlib.metadata import entry_points
from pathlib import Path

import spark

assert Path(spark.__file__).is_relative_to(sys.prefix), spark.__file__
assert spark.__version__ != "unknown"
commands = {entry.name: entry for entry in entry_points(group="console_scripts")}


def run(name, *arguments):
    print("$", name, *arguments, flush=True)
    code = commands[name].load()([str(argument) for argument in arguments])
    assert not code, code


small = ["--data.workers", 0, "--max_steps", 2, "--optim.batch_size", 2, "--log_every", 1, "--log_with", "none"]
run(
    *("spark-pretrain", "--config", "small", "--data.train", "photos", "--output_dir", "runs/a"),
    *("--model.name", "test_resnet", "--model.input_size", 64, "--model.decoder_width", 32, *small),
)
run("spark-export", "--checkpoint", "runs/a", "--output", "encoder")
run(
    *("spark-depth", "--config", "unetpp_nyu", "--encoder", "encoder", "--data.root", "nyu", "--output_dir", "runs/d"),
    *("--data.image_size", 48, 64, "--data.crop_size", 32, 32, "--data.white_border", "keep", "--data.border", "null"),
    *("--protocol", "nyu-bts-scaled", "--triptychs", 1, *small),
)
run("spark-predict", "--model", "runs/d/model", "--input", "photos/0.png", "--output", "depth")
run("spark-report", "runs/a", "runs/d", "--output", "page.html")
for name in commands:
    if name.startswith("spark-"):
        commands[name].load()
from finetune.commands.work.app import VIEWER

assert (VIEWER / "viewer.js").is_file()
"""


def clean(**more):
    """The environment of a user who has no clone on the path."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1", **more}


def run(*command, cwd, **options):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean(),
        capture_output=True,
        text=True,
        timeout=280,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def installed(tmp_path):
    """The wheel in an environment of its own, which sees the dependencies of this one but not the clone."""
    pytest.importorskip("build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "finetune", "spark"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ".", cwd=source)
    shutil.rmtree(source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "alone", cwd=tmp_path)
    python = tmp_path / "alone" / "bin" / "python"
    (site,) = (tmp_path / "alone" / "lib").glob("python*/site-packages")
    # A .pth file adds the folder alone, without the .pth files in it, of which one leads to the clone.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)
    return python


@pytest.mark.skipif(os.name == "nt", reason="folders of an environment as Unix has them")
def test_the_wheel_alone_pretrains_exports_trains_depth_and_predicts(installed, tmp_path):
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "photos" / f"{number}.png")
    make_depth_world(home / "nyu")
    assert "--data.train" in run(installed.with_name("spark-pretrain"), "--help", cwd=home)
    assert set(SCRIPTS) <= {path.name for path in installed.parent.iterdir()}
    run(installed, "-c", USER, cwd=home)
    assert np.load(home / "depth" / "0.npy").shape == (64, 80)
    assert "</html>" in (home / "page.html").read_text()


@pytest.mark.parametrize(
    "entry",
    [
        "spark/pretrain.py",
        "finetune/depth.py",
        "finetune/evaluate.py",
        "finetune/predict.py",
        "finetune/segment.py",
    ],
)
def test_entries_run_as_files_from_anywhere(entry, tmp_path):
    """With the package beside them, whichever is installed, and without their own folder on the path."""
    check = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = sys.argv.pop(0); runpy.run_path(sys.argv[0])"
    check += "; import spark; print(spark.__file__); print(sys.path[0])"
    script = ROOT / entry
    words = run(sys.executable, "-c", check, script.parent, script, cwd=tmp_path).split()
    assert words == [str(ROOT / "spark" / "__init__.py"), str(ROOT)]
    assert "--output" in run(sys.executable, script, "--help", cwd=tmp_path)
