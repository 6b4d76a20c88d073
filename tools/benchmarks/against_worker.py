"""A worker of `python -m tools.benchmark against`: runs in any checkout, and takes a step for each line "step".

It is given a case as JSON, and writes the value that both checkouts must agree in, then an answer a line: "done" for
"step", and the bytes that a step holds at most over what is held before it for "memory".
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

case = json.loads(sys.argv[1])
device = case["device"]
torch.set_num_threads(case["threads"])
torch.backends.cudnn.benchmark = True
torch.manual_seed(0)
images = torch.randn(case["batch"], 3, case["size"], case["size"])
model: Any = None
visible: Any = None
pyramid: Any = None
sparsify: Any = import_module("spark.sparse").sparsify
if case["kind"] == "depth":
    from finetune import DepthModel

    model = DepthModel(case["model"], image_size=(case["size"],) * 2)
else:
    from spark import SparK

    def named(module, name):
        """A function of a module that was spark.MODULE in older commits and is spark.model.MODULE now."""
        try:
            return getattr(import_module(f"spark.model.{module}"), name)
        except ImportError:
            return getattr(import_module(f"spark.{module}"), name)

    pyramid, random_visible = named("encoder", "pyramid"), named("masking", "random_visible")
    model = SparK(
        case["model"], case["size"], case["mask_ratio"], layout=case["layout"], decoder_width=case["width"]
    )
    visible = random_visible(
        case["batch"],
        model.grid,
        case["mask_ratio"],
        generator=torch.Generator().manual_seed(0),
        device=device,
    )


def loss() -> torch.Tensor:
    """That of SparK, the mean square of the encoder's features, or the mean depth."""
    if case["kind"] == "depth":
        return model(images).depth.mean()
    if case["kind"] == "step":
        return model(images, visible).loss
    maps = pyramid(model.encoder, sparsify(images, visible, case["layout"]), model.levels)
    return torch.stack([x.to_dense().float().square().mean() for x in maps]).sum()


model.to(device, memory_format=torch.channels_last).train()
images = images.to(device, memory_format=torch.channels_last)


def step():
    """Forward and backward."""
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case["precision"] == "bf16"):
        value = loss()
    value.backward()
    model.zero_grad(set_to_none=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return value.item()


def resident(entry):
    """An entry of /proc/self/status [bytes]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


def peak():
    """Most bytes that a step holds over what is held before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


print(step(), flush=True)
for line in sys.stdin:
    if line.strip() == "memory":
        print(peak(), flush=True)
    else:
        step()
        print("done", flush=True)
