"""What is golden: for each JSON file the cases in it, each a function of an empty folder that returns plain values.

Commands run in this process, in the folder, with relative paths, so that nothing they record names a machine.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from threadpoolctl import threadpool_limits

from tests.golden.compare import HERE, Tolerance
from tests.golden.processes import call
from tests.golden.project import (
    CONFIGS,
    MAINS,
    PROTOCOLS,
    DepthModel,
    SparK,
    depth_layouts,
    launched,
    load_depth_model,
    load_encoder,
    make_depth_world,
    open_depth_data,
    save_encoder,
    tiny,
    together,
)

Case = Callable[[Path], dict[str, Any]]

THREADS = 1
ROOT, FILES = HERE.parents[1], HERE / "files"
"""Runs and models that the first commit of these tests wrote; `write.py` renews them only when it is told so."""
OF_THE_CLOCK = ("images_per_second", "data_wait")
NYU, KITTI = (480, 640), (375, 1242)


# --- how commands run


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(name: str, options: Mapping[str, Any], *more: str) -> str:
    """Run a command as if in a new process with `THREADS` threads; returns what it printed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    printed = io.StringIO()
    try:
        # NumPy's sums take another order with more threads, too
        with contextlib.redirect_stdout(printed), threadpool_limits(THREADS):
            status = MAINS[name]([*(f"--{key}={value}" for key, value in options.items()), *more])
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not status, f"{name} ended with {status}"
    return printed.getvalue()


def columns(run: str) -> dict[str, list[Any]]:
    """metrics.jsonl of a run by columns, None where a row has no value, without what depends on the clock."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    names = dict.fromkeys(name for row in rows for name in row if name not in OF_THE_CLOCK)
    return {name: [row.get(name) for row in rows] for name in names}


def digest(path: str | Path) -> dict[str, Any]:
    """Of the tensors of a safetensors file: number, hashes of names with shapes and of the bits, and their norm."""
    names, bits, squares = hashlib.sha256(), hashlib.sha256(), []
    with safe_open(path, "pt") as file:
        keys = sorted(file.keys())
        for key in keys:
            value = file.get_tensor(key)
            names.update(f"{key} {list(value.shape)} {value.dtype}\n".encode())
            bits.update(value.contiguous().numpy().tobytes())
            squares.append(float((value.double() ** 2).sum()))
    norm = math.sqrt(math.fsum(squares))
    return {"tensors": len(keys), "names": names.hexdigest(), "sha256": bits.hexdigest(), "norm": norm}


def weights(run: str, step: int, name: str = "model.safetensors") -> dict[str, Any]:
    """The digest of what a checkpoint of a run holds."""
    return digest(Path(run, "checkpoints", f"step_{step:07d}", name))


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Give a model weights that are the same on every machine; variances are positive."""
    rng = np.random.default_rng(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            numbers = rng.uniform(-0.25, 0.25, value.shape).astype(np.float32)
            shift = 1.0 if name.endswith("running_var") else 0.0
            value.copy_(torch.from_numpy(np.asarray(numbers)) + shift)


def sample_of(values: torch.Tensor) -> dict[str, Any]:
    """Shape, mean, norm and some entries of a tensor."""
    flat = values.detach().double().flatten()
    some = flat[:: max(1, len(flat) // 6)].tolist()
    return {
        "shape": list(values.shape),
        "mean": float(flat.mean()),
        "norm": float(flat.norm()),
        "some": some,
    }


# --- pretraining


def make_photos(folder: str = "photos", count: int = 12) -> None:
    """Coloured tiles as PNG files."""
    rng = np.random.default_rng(0)
    Path(folder).mkdir()
    for number in range(count):
        tiles = rng.integers(0, 256, (5, 6, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        Image.fromarray(tiles).save(Path(folder, f"{number:02d}.png"))


def pretraining(**options: Any) -> dict[str, Any]:
    """Options of a run of 20 steps on the photos."""
    return {
        "model.name": "test_resnet",
        "model.layout": "packed",
        "model.input_size": 64,
        "model.decoder_width": 32,
        "data.train": "photos",
        "data.workers": 0,
        "optim.batch_size": 8,
        "optim.base_lr": 0.2,
        "optim.warmup_steps": 4,
        "max_steps": 20,
        "log_every": 1,
        "checkpoint_every": 0,
        "panels_every": 0,
        "monitor.every": 0,
        "output_dir": "run",
        **options,
    }


def pretrain_case(options: dict[str, Any], prepare: Callable[[], object] = make_photos) -> Case:
    """A run of 20 steps; its rows, its weights and its exported encoder."""

    def case(folder: Path) -> dict[str, Any]:
        with inside(folder):
            prepare()
            command("pretrain", pretraining(**options))
            found = {
                "rows": columns("run"),
                "weights": weights("run", 20),
                "encoder": digest("run/encoder/model.safetensors"),
                "encoder_config": json.loads(Path("run/encoder/config.json").read_text()),
            }
            if "optim.ema_decay" in options:
                found["averaged_weights"] = weights("run", 20, "ema.safetensors")
            return found

    return case


def make_shard() -> None:
    """The photos in a tar."""
    make_photos()
    with tarfile.open("shard.tar", "w") as archive:
        for path in sorted(Path("photos").iterdir()):
            archive.add(path, path.name)


def two_processes(folder: Path) -> dict[str, Any]:
    """A global batch over two processes, as a launcher starts them."""
    with inside(folder):
        make_photos()
    where = {"data.train": folder / "photos", "output_dir": folder / "run"}
    arguments = [f"--{name}={value}" for name, value in pretraining(**where).items()]
    with inside(ROOT):  # whence the server of the processes imports the packages
        done = together(call, MAINS["pretrain"], arguments, folder=folder, **launched("cpu_2_processes.yaml"))
    assert done.codes == [0, 0], done.stderr
    with inside(folder):
        return {"rows": columns("run"), "weights": weights("run", 20)}


def resumed(folder: Path) -> dict[str, Any]:
    """A run that stops after step 10 and goes on is the run that does not stop, bit for bit on any machine."""
    with inside(folder):
        make_photos()
        options = {"model.drop_path": 0.2, "optim.ema_decay": 0.9, "accumulation": 2}
        command("pretrain", pretraining(**options))
        whole = {"rows": columns("run"), "weights": weights("run", 20)}
        parts = {**options, "output_dir": "parts", "checkpoint_every": 10}
        command("pretrain", pretraining(**parts))
        shutil.rmtree("parts/checkpoints/step_0000020")
        printed = command("pretrain", pretraining(**parts, resume="true"))
        assert "continuing from" in printed
        assert "changed since that checkpoint" not in printed
        assert {"rows": columns("parts"), "weights": weights("parts", 20)} == whole
        return whole


PRETRAIN = {
    **{
        f"{layout}_{name}": pretrain_case({"model.layout": layout, "model.name": name})
        for layout in ("packed", "masked")
        for name in ("resnet18", "convnext_atto")
    },
    "accumulation": pretrain_case({"accumulation": 2}),
    "average": pretrain_case({"optim.ema_decay": 0.9, "export_ema": "true"}),
    "stream": pretrain_case(
        {"data.train": "shard.tar", "data.streaming": "true", "data.shuffle_buffer": 5}, make_shard
    ),
    "options": pretrain_case(
        {
            "optim.name": "adamw",
            "optim.base_lr": 0.03,
            "model.train_sizes": "[64,[64,96]]",
            "model.mask_ratio": "[0.4,0.6]",
            "model.target": "hog",
            "model.densify_norm": "ln",
            "model.drop_path": 0.1,
        }
    ),
    "two_processes": two_processes,
    "resumed": resumed,
}


# --- depth training


def training(**options: Any) -> dict[str, Any]:
    """Options of a run of 20 steps."""
    return {
        "encoder": "test_resnet",
        "data.root": "data",
        "data.list": "nyu_train.txt",
        "data.val_list": "nyu_val.txt",
        "data.image_size": "[48,64]",
        "data.crop_size": "[32,32]",
        "data.border": "null",
        "data.workers": 0,
        "model.head_options": '{"decoder_channels": [16, 8, 8, 8, 8]}',
        "protocol": "nyu-bts-scaled",
        "optim.batch_size": 4,
        "optim.lr": 2e-3,
        "optim.warmup_steps": 2,
        "max_steps": 20,
        "log_every": 1,
        "triptychs": 1,
        "validate_every": 0,
        "output_dir": "run",
        **options,
    }


def depth_case(options: dict[str, Any], prepare: Callable[[], object]) -> Case:
    """A run of 20 steps; its rows, weights, exported model and the evaluation of that."""

    def case(folder: Path) -> dict[str, Any]:
        with inside(folder):
            prepare()
            command("depth", training(**options))
            return {
                "rows": columns("run"),
                "weights": weights("run", 20),
                "model": digest("run/model/model.safetensors"),
                "model_config": json.loads(Path("run/model/config.json").read_text()),
                "metrics": json.loads(Path("run/evaluation.json").read_text())["metrics"],
            }

    return case


def make_sets() -> None:
    """Metres in two layouts, relations and relative depth."""
    depth_layouts.write_sync(Path("data"))
    depth_layouts.write_folder(Path("folder"), "pfm")
    depth_layouts.write_diw(Path("diw"))
    depth_layouts.write_redweb(Path("redweb"))


DEPTH = {
    "unetpp": depth_case({}, lambda: make_depth_world(Path("data"))),
    "metric_bins_segmentation": depth_case(
        {
            "model.head": "metric_bins",
            "model.head_options": '{"width": 16, "bins": 8, "embedding": 8, "attractors": [4, 2, 2, 1]}',
            "losses": '{"silog": 1.0, "segmentation": 0.1}',
            "loss_options": '{"segmentation": {"decoder_channels": [16, 8, 8, 8, 8]}}',
            "data.labels": 13,
            "optim.schedule": "onecycle",
            "optim.momentum": "[0.85,0.95]",
            "optim.encoder_lr_factor": 0.5,
        },
        lambda: depth_layouts.write_sync(Path("data")),
    ),
    "mixed_sets": depth_case(
        {
            "data.sets": "[{root: folder, weight: 0.5}, {root: diw}, {root: redweb}]",
            "losses": '{"silog": 1, "ranking": 0.1, "ssi": 0.1}',
            "accumulation": 2,
        },
        make_sets,
    ),
    "augmented_frozen_average": depth_case(
        {
            "data.rotation": 5,
            "data.colour": 1,
            "data.cut_depth": 0.5,
            "optim.frozen_epochs": 2,
            "optim.layer_decay": 0.8,
            "optim.ema_decay": 0.9,
            "losses": '{"l1": 1, "berhu": 0.5, "ssim": 0.5, "gradient": 0.1, "smoothness": 0.01}',
            "validate_every": 4,
            "model.drop_path": 0.1,
        },
        lambda: make_depth_world(Path("data")),
    ),
}


# --- scores


def guess(image: np.ndarray, seed: int) -> np.ndarray:
    """A prediction for a frame of `depth_layouts.scene`: near is bright, and wrong by blocks; a few pixels are none."""
    height, width = image.shape[:2]
    rng = np.random.default_rng(seed)
    wrong = rng.uniform(0.7, 1.3, (height // 16 + 1, width // 16 + 1)).repeat(16, 0).repeat(16, 1)
    depth = (10.5 - image.mean(2) / 25.5) * wrong[:height, :width]
    if seed == 1:
        depth[height // 2, 20:24] = np.nan, np.inf, -1, 0
    return depth.astype(np.float32)


def laser_points() -> np.ndarray:
    """Of a scan, [N, 3] in metres."""
    rng = np.random.default_rng(0)
    return np.stack([rng.uniform(5, 60, 4000), rng.uniform(-20, 20, 4000), rng.uniform(-3, 0, 4000)], 1)


SETS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nyu": (lambda root: depth_layouts.write_sync(root, 1, 2, NYU), "nyu_val.txt"),
    "nyu_labelled": (lambda root: depth_layouts.write_labeled(root), None),
    "nyu_pairs": (lambda root: depth_layouts.write_nyu_pairs(root, 2, NYU), "points.csv"),
    "kitti": (lambda root: depth_layouts.write_kitti(root, 2, KITTI), "eigen.txt"),
    "kitti_laser": (lambda root: depth_layouts.write_kitti_laser(root, laser_points(), KITTI), "list.txt"),
    "ibims": (lambda root: depth_layouts.write_ibims(root, 2, NYU), None),
    "diw": (lambda root: depth_layouts.write_diw(root), "DIW_train_val.csv"),
    "redweb": (lambda root: depth_layouts.write_redweb(root), None),
}


def with_frames(name: str) -> str | None:
    """Write a set to data/ and predictions for it to guesses/; returns its list."""
    make, listed = SETS[name]
    make(Path("data"))
    data = open_depth_data("data", listed, "test")
    for index, frame in enumerate(data.names()):
        path = Path("guesses", frame.lstrip("/")).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, guess(data[index].image, index))
    return listed


def scores(listed: str | None, **options: Any) -> dict[str, Any]:
    """Results of each protocol without what is of the protocol's prose."""
    where = {"data.root": "data", **({} if listed is None else {"data.list": listed})}
    command("evaluate", {"protocol": "all", "output": "results.json", "device": "cpu", **where, **options})
    results = json.loads(Path("results.json").read_text())
    every = results.get("protocols", [results])
    wanted = (
        "images",
        "pairs",
        "planes",
        "nonfinite_pixels",
        "nonpositive_pixels",
        "unusable",
        "protocol_hash",
    )
    return {
        one["protocol"]: {
            "keys": sorted(one),
            **{key: one[key] for key in ("metrics", "intervals", *wanted) if key in one},
        }
        for one in every
    }


def score_case(name: str) -> Case:
    """Predictions in files under every protocol that they can be scored under."""

    def case(folder: Path) -> dict[str, Any]:
        with inside(folder):
            return scores(with_frames(name), predictions="guesses")

    return case


def other_sources(folder: Path) -> dict[str, Any]:
    """Inverse depth, another unit and baselines."""
    with inside(folder):
        listed = with_frames("nyu")
        few = "nyu-bts,nyu-densedepth,nyu-affine"
        return {
            "disparity": scores(listed, predictions="guesses", holds="disparity"),
            "scale": scores(listed, predictions="guesses", scale=0.8, protocol=few),
            "constant": scores(listed, baseline="constant:3", protocol=few),
            "mean": scores(listed, baseline="mean", baseline_list="nyu_train.txt", protocol=few),
        }


def model_scores(folder: Path) -> dict[str, Any]:
    """A model's own predictions, where flips are averaged and the model is shown a part of the frame."""
    found = {}
    for name in ("nyu", "kitti", "diw"):
        root = folder / name
        root.mkdir()
        with inside(root):
            listed = with_frames(name)
            tiny_depth_model().save("model")
            found[name] = scores(listed, model="model")
    return found


def protocol_hashes(folder: Path) -> dict[str, Any]:
    """Of the settings of every protocol."""
    return {name: protocol.hash() for name, protocol in PROTOCOLS.items()}


SCORES = {
    **{name: score_case(name) for name in SETS},
    "other_sources": other_sources,
    "protocols": protocol_hashes,
}
MODEL_SCORES = {"model": model_scores}


# --- exports


def tiny_depth_model(head: str = "unetpp") -> DepthModel:
    """A depth model whose weights are the same on every machine."""
    model = DepthModel(tiny.NAME, head=head, image_size=(48, 64), **HEADS[head])
    fill(model)
    return model.eval()


HEADS: dict[str, dict[str, Any]] = {
    "unetpp": {"decoder_channels": (8, 8, 8, 8, 8)},
    "metric_bins": {"width": 16, "bins": 8, "embedding": 8, "attractors": (4, 2, 2, 1)},
    "fusion": {"width": 8},
    "lraspp": {"width": 8},
    "linear": {},
}


def exported(folder: Path) -> dict[str, Any]:
    """Of what is in the folder of an export the hashes of bytes, and what config.json says."""
    config = json.loads((folder / "config.json").read_text())
    return {"config": config, **{path.name: sha256(path) for path in sorted(folder.iterdir())}}


def saved_encoders(folder: Path) -> dict[str, Any]:
    """Bytes of `save_encoder`."""
    found: dict[str, Any] = {}
    for name in ("resnet18", "convnext_atto", "test_resnet", tiny.NAME):
        spark = SparK(name, 64, decoder_width=32)
        fill(spark)
        where = save_encoder(spark.encoder, folder / name, input_size=64)
        found[name] = exported(Path(where))
    return found


def saved_depth_models(folder: Path) -> dict[str, Any]:
    """Bytes of `DepthModel.save`."""
    found: dict[str, Any] = {}
    for head in HEADS:
        where = tiny_depth_model(head).save(folder / head)
        found[head] = exported(Path(where))
    return found


def graph(path: str) -> dict[str, Any]:
    """Names and shapes of the inputs, outputs and weights of an ONNX file, and what it says of itself."""
    model = onnx.load(path)

    def shape(value: Any) -> list[Any]:
        return [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]

    return {
        "inputs": {value.name: shape(value) for value in model.graph.input},
        "outputs": {value.name: shape(value) for value in model.graph.output},
        # the exporter numbers what it has folded
        "weights": [
            f"{re.sub('_[0-9]+$', '', each.name)} {list(each.dims)}" for each in model.graph.initializer
        ],
        "metadata": {
            each.key: each.value for each in model.metadata_props if each.key != "largest_difference"
        },
        "opset": {each.domain: each.version for each in model.opset_import},
    }


def graphs(folder: Path) -> dict[str, Any]:
    """ONNX files of an encoder and of a depth model."""
    with inside(folder):
        model = tiny_depth_model()
        model.save("model")
        spark = SparK(tiny.NAME, 64, decoder_width=32)
        fill(spark)
        save_encoder(spark.encoder, "encoder", input_size=64)
        command("export_encoder", {"checkpoint": "encoder", "output": "encoder.onnx"})
        command("export_depth", {"model": "model", "output": "depth.onnx"})
        return {name: graph(f"{name}.onnx") for name in ("encoder", "depth")}


EXPORTS = {"encoders": saved_encoders, "depth_models": saved_depth_models}
GRAPHS = {"onnx": graphs}


# --- options


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> default of every option of a dataclass; "(required)" without one."""
    kinds, found = typing.get_type_hints(cls), {}
    for item in dataclasses.fields(cls):
        name, kind = prefix + item.name, kinds[item.name]
        if dataclasses.is_dataclass(kind):
            found |= defaults(kind, f"{name}.")
        elif item.default is not dataclasses.MISSING:
            found[name] = plain(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            found[name] = plain(item.default_factory())
        else:
            found[name] = "(required)"
    return found


def option_defaults(folder: Path) -> dict[str, Any]:
    """Of the commands whose options are a dataclass."""
    return {name: defaults(cls) for name, cls in CONFIGS.items()}


def help_names(folder: Path) -> dict[str, Any]:
    """Names of the options that `--help all` lists."""
    found: dict[str, Any] = {}
    for name, main in MAINS.items():
        printed = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
            main(["--help", "all"])
        names = re.findall(r"^  (--[\w.]+)", printed.getvalue(), flags=re.MULTILINE)
        assert names, name
        found[name] = sorted(set(names))
    return found


OPTIONS = {"defaults": option_defaults, "help": help_names}


# --- files of the first commit


def tiny_pretraining(**options: Any) -> dict[str, Any]:
    """The run in files/pretrain: 3 steps, of which 2 are in its checkpoint."""
    given = {
        "model.name": tiny.NAME,
        "max_steps": 3,
        "optim.warmup_steps": 1,
        "checkpoint_every": 2,
        "optim.ema_decay": 0.9,
    }
    return pretraining(**{**given, "output_dir": "pretrain", **options})


def tiny_training(**options: Any) -> dict[str, Any]:
    """The run in files/depth, likewise."""
    channels = '{"decoder_channels": [8, 8, 8, 8, 8]}'
    given = {"encoder": "pretrain/encoder", "model.head_options": channels, "optim.ema_decay": 0.9}
    return training(**{**given, "max_steps": 3, "checkpoint_every": 2, "output_dir": "depth", **options})


def tiny_data() -> None:
    """What the runs in files/ were trained on."""
    make_photos()
    make_depth_world(Path("data"))


def write_files(folder: Path) -> None:
    """Make files/ anew."""
    with inside(folder):
        tiny_data()
        command("pretrain", tiny_pretraining())
        command("depth", tiny_training())
        shown = {"model": "depth/model", "device": "cpu"}
        scored = {"data.root": "data", "data.list": "nyu_val.txt", "protocol": "nyu-bts-scaled"}
        command("evaluate", {**shown, **scored, "output": "depth/results.json"})
        fitted = {"data.root": "data", "data.list": "nyu_train.txt", "pairs": 4, "fit": "scale"}
        command("calibrate", {**shown, **fitted, "output": "calibrated"})
        predicted = {"input": "data/val_scene/rgb_*.png", "output": "predictions/val_scene"}
        command("predict", {**shown, **predicted, "formats": "[npy]"})
    keep = (
        *(f"pretrain/{name}" for name in ("config.yaml", "metrics.jsonl", "encoder")),
        *(
            f"depth/{name}"
            for name in ("config.yaml", "metrics.jsonl", "model", "evaluation.json", "results.json")
        ),
        *(f"{run}/checkpoints/step_0000002" for run in ("pretrain", "depth")),
        *("calibrated", "predictions"),
    )
    shutil.rmtree(FILES, ignore_errors=True)
    for name in keep:
        source, target = folder / name, FILES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def copy_files(*names: str) -> None:
    """Copies of what lies in files/, and the data of its runs."""
    for name in names:
        shutil.copytree(FILES / name, name)
    tiny_data()


def goes_on(run: str, name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """A run of files/ makes its third step; nothing of it counts as changed."""
    with inside(folder):
        copy_files(*options.pop("files"))
        shown = {"config": f"{run}/config.yaml", "resume": "true"}
        printed = command(name, shown)
        assert "continuing from" in printed
        assert "changed since that checkpoint" not in printed
        return {"rows": columns(run), "weights": weights(run, 3)}


def pretraining_goes_on(folder: Path) -> dict[str, Any]:
    """The run of files/pretrain."""
    found = goes_on("pretrain", "pretrain", folder, files=["pretrain"])
    with inside(folder):
        return {**found, "averaged_weights": weights("pretrain", 3, "ema.safetensors")}


def depth_training_goes_on(folder: Path) -> dict[str, Any]:
    """The run of files/depth."""
    found = goes_on("depth", "depth", folder, files=["pretrain", "depth"])
    with inside(folder):
        evaluated = json.loads(Path("depth/evaluation.json").read_text())
        return {**found, "metrics": evaluated["metrics"]}


def images(size: tuple[int, int]) -> torch.Tensor:
    """Two images of numbers that are the same on every machine."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32))


def loaded_models(folder: Path) -> dict[str, Any]:
    """Outputs of the encoders and depth models of files/."""
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        encoder = load_encoder(FILES / "pretrain" / "encoder").eval()
        found = {"encoder": sample_of(encoder.forward_features(images((64, 64))))}
        for name in ("depth/model", "calibrated"):
            model = load_depth_model(FILES / name).eval()
            found[name] = sample_of(model(images((48, 64))).depth)
    with inside(folder):
        copy_files("pretrain")
        for name, more in {"last": (), "averaged": ("--ema",)}.items():
            command("export_encoder", {"checkpoint": "pretrain", "output": name}, *more)
            found[f"exported_{name}"] = digest(Path(name, "model.safetensors"))
        start = {"model.init": "pretrain", "output_dir": "further", "max_steps": 1, "checkpoint_every": 0}
        command("pretrain", tiny_pretraining(**start))
        found["started_from_run"] = columns("further")
    return found


def read_results(folder: Path) -> dict[str, Any]:
    """results.json and predictions of files/ beside new results; reports of the runs can be written."""
    with inside(folder):
        copy_files("pretrain", "depth", "calibrated", "predictions")
        scored = {"data.root": "data", "data.list": "nyu_val.txt", "protocol": "nyu-bts-scaled"}
        command("evaluate", {**scored, "predictions": "predictions", "output": "predicted.json"})
        command("evaluate", {**scored, "model": "calibrated", "device": "cpu", "output": "calibrated.json"})
        command("compare", {"output": "compared.csv"}, "depth/results.json", "calibrated.json")
        with open("compared.csv", newline="") as file:
            compared = [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]
        for run in ("pretrain", "depth"):
            command("report", {}, run)
            assert Path(run, "report.html").is_file()
        record = json.loads(Path("predictions/val_scene/predictions.json").read_text())
        return {
            "predicted": json.loads(Path("predicted.json").read_text())["metrics"],
            "calibrated": json.loads(Path("calibrated.json").read_text())["metrics"],
            "written": json.loads(Path("depth/results.json").read_text())["metrics"],
            "compared": compared,
            "record": sorted(record),
        }


def number(text: str) -> Any:
    """The number that a cell of a CSV file holds, or its text."""
    try:
        return float(text)
    except ValueError:
        return text


LOADING = {
    "pretraining_goes_on": pretraining_goes_on,
    "depth_training_goes_on": depth_training_goes_on,
    "models": loaded_models,
    "results": read_results,
}


CASES: dict[str, dict[str, Case]] = {
    "pretrain": PRETRAIN,
    "depth": DEPTH,
    "scores": SCORES,
    "model_scores": MODEL_SCORES,
    "exports": EXPORTS,
    "graphs": GRAPHS,
    "options": OPTIONS,
    "loading": LOADING,
}
"""The JSON files."""

FIRST = (r"\.rows\.(loss\w*|grad_norm)\[[0-2]\]$", 5e-6, 1e-7)
"""The first three steps, in which nothing but the rounding of one step can differ."""
TOLERANCES: dict[str, Tolerance | None] = {
    "pretrain": [
        FIRST,
        (r"\.rows\.loss", 1e-3, 0.0),
        (r"\.rows\.grad_norm", 0.3, 0.0),
        (r"weights|encoder\.norm", 1e-3, 0.0),
        ("", 1e-6, 0.0),
    ],
    "depth": [
        FIRST,
        (r"\.rows\.loss", 0.1, 0.0),
        (r"\.rows\.grad_norm", 0.5, 0.0),
        (r"\.rows\.val_|\.metrics\.", 0.1, 1e-2),
        (r"\.norm", 1e-2, 0.0),
        ("", 1e-6, 0.0),
    ],
    "scores": [("", 1e-6, 1e-12)],
    "model_scores": [(r"wkdr|diw", 0.3, 0.1), (r"metrics|intervals", 5e-3, 1e-4), ("", 1e-6, 0.0)],
    "exports": None,
    "graphs": None,
    "options": None,
    "loading": [("", 5e-6, 1e-7)],
}
"""How far numbers may be from those of another processor or PyTorch; None: not at all.

Measured between the AVX-512 and the AVX2 kernels of one processor, and about ten times that. Rounding grows where a
unit comes to the kink of its activation: after some steps, losses of pretraining are off by up to 1e-4, of depth by
2e-3, and norms of gradients by up to 9 %. Of a model, pairs of points at nearly one depth change their order.
"""
