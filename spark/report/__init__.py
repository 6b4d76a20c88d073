"""The page about runs: ``report.html`` of a run folder, and the parts that pages about several runs are made of."""

from pathlib import Path

from spark.report.page import render, write_page
from spark.report.pretraining import PRETRAINING
from spark.report.runs import Run, RunKind, read_run
from spark.report.sections import environments, events, settings
from spark.training.environment import environment

__all__ = [
    "PRETRAINING",
    "REPORT",
    "Run",
    "RunKind",
    "environments",
    "events",
    "pretraining_page",
    "read_run",
    "render",
    "run_page",
    "settings",
    "write_page",
    "written_by",
]

REPORT = "report.html"


def run_page(folder: str | Path, kind: RunKind) -> Path:
    """Write ``report.html`` of a run into its folder, from its files. OSError: it cannot be written."""
    run = kind.read(read_run(folder))
    sections = [*kind.sections({run.label: [run]}), events([run]), settings([run]), environments([run])]
    return write_page(Path(folder) / REPORT, render(run.label, sections, footer=written_by()))


def pretraining_page(folder: str | Path) -> Path:
    """`run_page` of a pretraining run."""
    return run_page(folder, PRETRAINING)


def written_by() -> str:
    """The last line of a page: the versions that wrote it."""
    here = environment()
    return f"Written with Python {here['python']}, torch {here['torch']}, timm {here['timm']} on {here['system']}."
