"""Imports run one way between the rooms of the house, read off the syntax trees; importing does no
work; names shadow nothing; nothing names one machine."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.together import start

ROOT = Path(__file__).resolve().parents[1]
# Whoever stands later may import whoever stands earlier; who stands side by side may not import each other.
ORDER = {
    "spark": [
        "errors seeds",
        "files",
        "sparse",
        "model",
        "weights",
        "training",
        "config options",
        "images",
        "report start",
        "monitor",
        "task",
        "commands pretrain",
    ],
    "finetune": [
        "construct options least_squares",
        "protocols depth_data",
        "heads",
        "model losses config",
        "scoring",
        "report",
        "predicting tasks",
        "commands",
        "classify depth evaluate predict segment",
    ],
}
RANKS = {
    package: {room: rank for rank, rooms in enumerate(order) for room in rooms.split()}
    for package, order in ORDER.items()
}
ENTRIES = {
    "spark.pretrain",
    *(f"finetune.{name}" for name in ("classify", "depth", "evaluate", "predict", "segment")),
}


def modules():
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    rooms = {package: set() for package in ORDER}
    for module, path in modules():
        package, _, inside = module.partition(".")
        if not inside:
            continue
        room = inside.split(".")[0]
        rooms[package].add(room)
        assert room in RANKS[package], (
            f"{module} has no place in the order of rooms: give it one in this test"
        )
        for name in imports_of(path):
            other, *rest = name.split(".")
            assert other not in ("tools", "tests"), f"{module} imports {name}"
            assert not (package == "spark" and other == "finetune"), f"{module} imports {name}"
            assert not (package == "finetune" and name.startswith("spark.sparse")), f"{module} imports {name}"
            assert not any(f"{name}.".startswith(f"{entry}.") for entry in ENTRIES), (
                f"{module} imports {name}"
            )
            if other == package and rest and rest[0] in RANKS[package] and rest[0] != room:
                ranks = RANKS[package]
                beside = {room, rest[0]} <= {"config", "model", "losses"}
                assert ranks[rest[0]] < ranks[room] or beside, (
                    f"{module} imports {name}, which stands above it"
                )
    for package, found in rooms.items():
        assert found == set(RANKS[package])


@pytest.mark.parametrize("folder", ["spark", "finetune"])
def test_no_module_shadows_another_package(folder):
    """Python puts the folder of a script first on its path: `spark/queue.py` would hide the standard `queue`."""
    names = {p.stem for p in (ROOT / folder).glob("*.py")} | {
        p.name for p in (ROOT / folder).iterdir() if p.is_dir()
    }
    names -= {"__init__", "__pycache__", "evaluate"}  # evaluate.py is the public name of an entry script
    for name in names:
        assert name not in sys.stdlib_module_names, f"{folder}/{name} hides the standard library's {name}"
        spec = importlib.util.find_spec(name)
        assert spec is None or spec.origin is None or str(ROOT) in spec.origin, (
            f"{folder}/{name} hides {spec.origin}"
        )


def test_only_two_modules_call_timm_create_model():
    users = [
        module
        for module, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "timm.create_model"
    ]
    assert set(users) <= {"spark.model.encoder", "spark.weights.encoder", "spark.weights.official"}, users


def import_anew():
    """Import both packages, and all that they offer, as a program with foreign arguments would."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("spark", "finetune")]:
        del sys.modules[name]
    sys.argv = ["x", "--nonsense"]
    import spark
    import spark.images.sources

    assert not {"spark.model.spark", "spark.weights.encoder"} & set(sys.modules), (
        "light modules wait for nothing"
    )
    for package in (spark, importlib.import_module("finetune")):
        assert package.__all__
        assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="module 'spark' has no attribute 'Nonsense'"):
        spark.Nonsense  # noqa: B018
    assert not torch.cuda.is_initialized()
    assert not torch.distributed.is_initialized()
    print("imported")


def test_import_does_no_work(tmp_path):
    """Importing the packages starts no process group, reads no argument and touches no GPU."""
    process = start(import_anew, folder=tmp_path)
    assert process.ended(200) == 0, process.stderr()
    assert process.stdout() == "imported\n"


def test_nothing_names_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".csv", ".ipynb"} and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(work|root|home|farm)/\w", text), name
