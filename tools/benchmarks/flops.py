"""What computing visible sites only could gain at most, counted, and measured throughput drawn against it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure

from finetune.report.figures import save_figure
from spark import SparK
from spark.model.encoder import pyramid
from spark.sparse import sparsify
from tools.benchmarks.contenders import Bench
from tools.benchmarks.models import count_macs

_PANEL = ("model", "batch", "height", "width")
_COLOURS = {
    "original": "tab:gray",
    "masked": "tab:blue",
    "packed": "tab:orange",
    "spconv": "tab:green",
    "triton": "tab:red",
    "masked, compiled": "tab:cyan",
    "packed, compiled": "tab:brown",
}
_COUNTED = ("original", "masked", "packed")  # the others have kernels that PyTorch's counter does not see


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of the convolutions and matrix products in a forward."""
    with torch.no_grad():
        return round(2 * count_macs(run))


def flops_per_image(bench: Bench, kind: str) -> tuple[dict[str, float], float]:
    """Forward FLOPs of an image: what each contender whose operators are PyTorch's computes, and the limit.

    The limit is the masked layout's encoder times the visible share, plus, in a "step", as much of densify and all of
    the decoder, which has to be dense. The backward costs about twice as much of each, so ratios hold for a whole step.
    """

    def count(name: str, what: str) -> float:
        contender = bench.contenders[name]
        return count_flops(lambda: bench.forward(contender, what)) / bench.case.batch

    computed = {name: count(name, kind) for name in bench.contenders if name in _COUNTED}
    sparse = count("masked", "encoder") + (densify_flops(bench) if kind == "step" else 0)
    return computed, computed["masked"] - (1 - bench.visible_share) * sparse


def densify_flops(bench: Bench) -> float:
    """Forward FLOPs that densify takes for an image, over whole maps."""
    model = cast(SparK, bench.contenders["masked"].model)
    with torch.no_grad():
        maps = pyramid(model.encoder, sparsify(bench.images["masked"], bench.visible, "masked"), model.levels)
    stages = list(zip(model.densify, reversed(maps), strict=True))
    return count_flops(lambda: [densify(x) for densify, x in stages]) / bench.case.batch


def plot_scaling(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw images/s against the mask ratio, a panel for each model, batch and size (whose rows follow each other).

    The dashed limit is that of visible FLOPs, computed as fast as the panel's fastest counted contender computes its
    own.
    """
    panels = [
        (key, list(group)) for key, group in itertools.groupby(rows, lambda row: [row[c] for c in _PANEL])
    ]
    figure = Figure(figsize=(5 * len(panels), 4), dpi=120, layout="constrained")
    for axes, (key, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, colour in _COLOURS.items():
            own = sorted(
                (row for row in group if row["contender"] == name), key=lambda row: float(row["mask_ratio"])
            )
            ratios = [float(row["mask_ratio"]) for row in own]
            rates = [float(row["images_per_second"]) for row in own]
            if own:
                axes.plot(ratios, rates, "o-", color=colour, label=name)
        counted = [row for row in group if row["gflops"]]
        fastest = max(float(row["images_per_second"]) * float(row["gflops"]) for row in counted)
        points = sorted({(float(row["mask_ratio"]), fastest / float(row["gflops_limit"])) for row in counted})
        axes.plot(*zip(*points, strict=True), "--", color="black", label="limit (visible FLOPs)")
        model, batch, height, width = key
        axes.set(title=f"{model}, batch {batch}, {height}x{width} px", xlabel="mask ratio", ylabel="images/s")
        axes.set_ylim(bottom=0)
        axes.legend()
    first = rows[0]
    figure.suptitle(f"{first['device']}, {first['threads']} threads, {first['precision']}", fontsize=9)
    save_figure(figure, path)
