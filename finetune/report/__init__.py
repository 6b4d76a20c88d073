"""The page about depth runs, built with `spark.report`."""

from pathlib import Path

from finetune.report.sections import depth_sections
from spark.report import REPORT, environments, events, read_run, render, settings, write_page, written_by

__all__ = ["depth_page", "depth_sections"]


def depth_page(folder: str | Path) -> Path:
    """Write ``report.html`` of a depth run into its folder, from what the folder holds.

    Raises:
        OSError: it could not be written.
    """
    run = read_run(folder)
    sections = [*depth_sections({run.label: [run]}), events([run]), settings([run]), environments([run])]
    page = render(run.label, sections, footer=written_by())
    return write_page(Path(folder) / REPORT, page)
