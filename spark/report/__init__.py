"""The page about runs: ``report.html`` of a run folder, and the parts that pages about several runs are made of."""

from pathlib import Path

from spark.report.page import render, write_page
from spark.report.pretraining import pretraining_sections
from spark.report.runs import Run, read_run
from spark.report.sections import environments, events, settings
from spark.training.environment import environment

__all__ = [
    "REPORT",
    "Run",
    "environments",
    "events",
    "pretraining_page",
    "pretraining_sections",
    "read_run",
    "render",
    "settings",
    "write_page",
    "written_by",
]

REPORT = "report.html"


def pretraining_page(folder: str | Path) -> Path:
    """Write ``report.html`` of a pretraining run into its folder, from what the folder holds.

    Raises:
        OSError: it could not be written.
    """
    run = read_run(folder)
    sections = [
        *pretraining_sections({run.label: [run]}),
        events([run]),
        settings([run]),
        environments([run]),
    ]
    page = render(run.label, sections, footer=written_by())
    return write_page(Path(folder) / REPORT, page)


def written_by() -> str:
    """The last line of a page: the versions that wrote it."""
    here = environment()
    return f"Written with Python {here['python']}, torch {here['torch']}, timm {here['timm']} on {here['system']}."
