"""What spark-doctor does, once its options are read."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from finetune.depth_data.doctor import Diagnosis, diagnose
from finetune.depth_data.sample import DepthSample
from finetune.options import DoctorConfig
from finetune.report.figures import colourise, save_figure, shared_range
from spark.errors import UserError


def examine(config: DoctorConfig) -> bool:
    """Examine, report, draw; returns whether nothing is wrong."""
    if not Path(config.path).exists():
        raise UserError(f"{config.path} does not exist")
    reading = {name: value for name, value in config.reading().items() if name != "kind"}
    found = diagnose(
        Path(config.path),
        config.list,
        val_list=config.val_list,
        kind=config.kind,
        samples=config.samples,
        **reading,
    )
    report(found, Console())
    if config.output and found.drawn:
        try:
            print(f"drawn in {save_figure(draw(found.drawn), config.output)}")
        except OSError as error:
            raise UserError(f"{config.output} cannot be written: {error}") from error
    return found.healthy


def report(found: Diagnosis, console: Console) -> None:
    """Print what was found."""
    console.print(f"layout  {found.kind or 'not recognised'}", markup=False, highlight=False)
    if found.about:
        console.print(f"data    {found.about}", markup=False, highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in sorted(found.findings, key=lambda finding: not finding.fault):
        style = "bold red" if finding.fault else "dim"
        text = own_options(finding.text).replace("[", r"\[")
        table.add_row(f"[{style}]{finding.fault or 'note'}[/]", text)
    console.print(table, highlight=False)
    faults = sum(bool(finding.fault) for finding in found.findings)
    verdict = {0: "nothing is wrong", 1: "1 thing is wrong"}.get(faults, f"{faults} things are wrong")
    console.print(verdict, highlight=False)


def own_options(text: str) -> str:
    """A sentence of a reader, which names the options of a training run, with those of this command."""
    text = re.sub(r"give --data\.list null( \(in training: [^)]*\))?", "leave --list out", text)
    return re.sub(r"(--)?\bdata\.(list|kind|depth_scale|bad_depth)\b", r"--\2", text)


def draw(samples: Sequence[DepthSample]) -> Figure:
    """A row a sample: image, what is known of its depth, and both together."""
    heights = [3.1 * sample.image.shape[0] / sample.image.shape[1] + 0.3 for sample in samples]  # [inch]
    figure = Figure((9.6, sum(heights) + 0.3), dpi=100, layout="constrained")
    grid = figure.subplots(len(samples), 3, squeeze=False, height_ratios=heights)
    for row, (axes, sample) in enumerate(zip(grid, samples, strict=True)):
        axes[0].imshow(sample.image)
        axes[0].set_ylabel(sample.name[-int(16 * heights[row]) :], fontsize=6)
        if sample.pairs is not None and sample.relation is not None:
            for place in (0, 1):
                axes[place].imshow(sample.image)
            colours = {1: ("tab:blue", "tab:red"), -1: ("tab:red", "tab:blue"), 0: ("tab:green",) * 2}
            for (ya, xa, yb, xb), relation in zip(sample.pairs, sample.relation, strict=True):
                axes[1].plot([xa, xb], [ya, yb], "-", color="white", linewidth=1)
                for x, y, colour in zip((xa, xb), (ya, yb), colours[int(relation)], strict=True):
                    axes[1].plot(x, y, "o", color=colour, markeredgecolor="white")
            axes[2].axis("off")
        else:
            depth = sample.depth
            if depth is None:
                assert sample.affine is not None
                depth = np.nan_to_num(1.05 - sample.affine, nan=0.0)  # far is blue here, too
            near, far = shared_range([depth])
            colours = colourise(depth, near, far)
            if sample.depth is not None:
                axes[1].set_xlabel(f"{near:.3g} to {far:.3g} m", fontsize=6)
            axes[1].imshow(colours)
            axes[2].imshow((0.5 * sample.image + 0.5 * colours).astype(np.uint8))
        for place in axes:
            place.set_xticks([])
            place.set_yticks([])
        if not row:
            titles = ("image", "depth: near red, far blue, none grey", "both")
            if sample.pairs is not None:
                titles = ("image", "points: closer red, farther blue, as far green", "")
            for place, title in zip(axes, titles, strict=True):
                place.set_title(title, fontsize=8)
    return figure
