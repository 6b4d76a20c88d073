"""Imports run one way (DESIGN.md), read off the syntax trees; names shadow nothing; nothing names one machine."""

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
ENTRIES = {"spark.pretrain", "finetune.depth", "finetune.evaluate", "finetune.predict"}
# Whoever stands later may import whoever stands earlier, and those of the same line each other.
LAYERS = [
    {"seeding", "sharding"},
    {"masking"},
    {"sparse"},
    {"hog"},
    {"folding", "encoder", "criterion"},
    {"parts", "dense"},
    {"decoder"},
    {"model"},
    {"decoding"},
    {"bands"},
    {"sources"},
    {"folders", "keys", "config", "optim", "images", "probing", "guard", "monitor"},
    {"steps", "channels"},
    {"streaming"},
    {"official"},
    {"export", "graphs"},
    {"hub"},
    {"export_options"},
    {"checkpoint"},
    {"continuation"},
    {"run"},
    {"feed"},
    {"assembly", "watching", "state"},
    {"reporting"},
    {"outputs"},
    {"pretrain"},
]


def modules():
    for package in ("spark", "finetune"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_spark_imports_run_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    seen = set()
    for module, path in modules():
        if not module.startswith("spark."):
            continue
        own = module.split(".")[1]
        assert own in rank, f"{module} has no place in the order of layers: give it one in this test"
        seen.add(own)
        for name in imports_of(path):
            if name.startswith("spark.") and (other := name.split(".")[1]) in rank:
                assert rank[other] <= rank[own], f"{module} imports {name}, which stands above it"
    assert seen == set(rank)


def test_finetune_knows_neither_sparse_values_nor_entry_scripts():
    for module, path in modules():
        for name in imports_of(path):
            assert not any(name == e or name.startswith(e + ".") for e in ENTRIES), f"{module} imports {name}"
            if module.startswith("finetune"):
                assert not name.startswith("spark.sparse"), f"{module} imports {name}"
            else:
                assert not name.startswith("finetune"), f"{module} imports {name}"
            assert not name.startswith(("tools.", "tests.")), f"{module} imports {name}"


@pytest.mark.parametrize("folder", ["spark", "finetune", "tools"])
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


def test_only_encoder_modules_call_timm_create_model():
    users = [
        module
        for module, path in modules()
        if "timm.create_model(" in re.sub(r"#.*|\"\"\".*?\"\"\"", "", path.read_text(), flags=re.S)
    ]
    assert set(users) <= {"spark.model.encoder", "spark.weights.encoder", "spark.weights.official"}, users


def import_anew():
    """Import both packages, and all that they offer, as a program with foreign arguments would."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("spark", "finetune")]:
        del sys.modules[name]
    sys.argv = ["x", "--nonsense"]
    import spark
    import spark.images.sources
    import spark.training.accelerator

    assert not {"spark.model.spark", "spark.training.checkpoint"} & set(sys.modules), (
        "light modules need not wait for timm"
    )
    for package in (spark, importlib.import_module("finetune")):
        assert package.__all__
        assert all(getattr(package, name).__name__ == name for name in package.__all__)
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
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".csv"} and path.exists():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(work|root|home|farm)/\w", text), name
