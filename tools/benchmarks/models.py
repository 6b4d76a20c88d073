"""What models cost: parameters, multiplications, seconds of a pretraining step and of a forward."""

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.model.depth_model import load_depth_model
from spark.config import PretrainConfig
from spark.files import write_whole
from spark.sparse.choice import device_name
from spark.task import build_model
from spark.training.cli import parse_config
from tools.benchmarks.timing import interleaved, summary


def parameters(*modules: nn.Module) -> float:
    """Parameters that take part in the model's output, in millions (a classifier's norm does not)."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad) / 1e6


def count_macs(run: Callable[[], object]) -> float:
    """Multiply-accumulates of the convolutions and matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


@functools.cache
def depth_cost(model: Path, size: tuple[int, int]) -> dict[str, str]:
    """Parameters in millions, and multiply-accumulates of a forward of one image of (H, W) `size`, in 10^9."""
    loaded = load_depth_model(model)
    with torch.no_grad():
        macs = count_macs(lambda: loaded(torch.zeros(1, 3, *size)))
    return {
        "parameters_M": f"{parameters(loaded.encoder, loaded.head):.2f}",
        "gmacs": f"{macs / 1e9:.2f}",
    }


def kept(path: Path) -> dict[str, Any]:
    """What an earlier measurement wrote; empty where there was none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def latencies(runs: Mapping[str, Path], path: Path, size: Sequence[int], rounds: int) -> dict[str, str]:
    """Time of a forward of one image over that of the first model: median of paired rounds, one thread; kept in `path`.

    Args:
        runs: name -> folder of a depth model.
        path: file with earlier measurements of the same models.
        size: (H, W) of the image [px].
        rounds: timed forwards of each.
    """
    found = kept(path)
    if found.keys() == runs.keys():
        return found
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: load_depth_model(folder).to(device) for name, folder in runs.items()}
    images, threads = torch.zeros(1, 3, *size, device=device), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            steps = {name: lambda model=model: model(images) for name, model in models.items()}
            seconds = interleaved(steps, rounds, device)
    finally:
        torch.set_num_threads(threads)
    base = next(iter(seconds.values()))
    ratios = {
        name: f"{statistics.median(one / other for one, other in zip(times, base, strict=True)):.2f}"
        for name, times in seconds.items()
    }
    write_whole(path, json.dumps(ratios, indent=1).encode())
    return ratios


def step_costs(
    options: Mapping[str, Mapping[str, Any]], path: Path, batch: int, rounds: int
) -> dict[str, dict[str, str]]:
    """Seconds of a pretraining step and its speed over the first model's, kept in `path`.

    Args:
        options: name -> options of spark/pretrain.py.
        path: file with earlier measurements; models that are not in it are measured in turns with the first.
        batch: images of a step.
        rounds: timed steps of each.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, first = kept(path), next(iter(options))
    missing = [name for name in options if name not in found]
    if missing:
        torch.manual_seed(0)
        steps = {
            name: pretraining_step(options[name], batch, device) for name in dict.fromkeys([first, *missing])
        }
        seconds = interleaved(steps, rounds, device)
        for name in missing:
            cost = summary(seconds[name], seconds[first], batch)
            found[name] = {
                "step_seconds": cost["seconds_median"],
                "step_speedup": cost["speedup_median"],
                "device": device_name(device),
            }
        write_whole(path, json.dumps(found, indent=1).encode())
    return found


def pretraining_step(options: Mapping[str, Any], batch: int, device: str) -> Callable[[], object]:
    """A forward and backward of the model that some options pretrain."""
    given = {name: value for name, value in options.items() if name == "config" or name.startswith("model.")}
    required = ["--data.train", "read by pretraining", "--output_dir", "."]
    text = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    config = parse_config(PretrainConfig, [*text, *required], "").model
    model = build_model(config).to(device)
    images = torch.randn(batch, config.in_chans, *model.input_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    precision = str(options.get("precision", "fp32"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def step() -> None:
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            loss = model(images).loss
        loss.backward()
        model.zero_grad()

    return step
