"""The page itself: blocks of content, and the template that makes one HTML file of them.

Everything is inside the file: style, pictures, drawings. The template escapes whatever comes from a run; it has no
script, and nothing in it is fetched.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from PIL import Image

from spark.files import write_whole
from spark.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Drawing, Line, draw

PICTURE_WIDTH = 1600  # [px], wider pictures are reduced
PICTURE_BYTES = 400_000  # larger files are encoded anew


@dataclass(frozen=True)
class Block:
    """A piece of a section; `kind` is the name of its macro in the template."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Text(Block):
    """A paragraph; with `note`, one about something that is missing or to be minded."""

    kind: ClassVar[str] = "text"
    text: str
    note: bool = False


@dataclass(frozen=True)
class Tiles(Block):
    """Numbers in large type: (name, value, remark)."""

    kind: ClassVar[str] = "tiles"
    tiles: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Chart(Block):
    """A line chart with its heading, a remark (such as the last value) and a legend if it has several lines."""

    kind: ClassVar[str] = "chart"
    title: str
    drawing: Drawing
    legend: list[tuple[str, int]]
    remark: str = ""

    @classmethod
    def of(cls, title: str, lines: Sequence[Line], steps: int, remark: str = "") -> "Chart":
        """Draw lines, at least one, over `steps`."""
        legend = [(line.label, line.color) for line in lines] if len(lines) > 1 else []
        return cls(title, draw(lines, steps), legend, remark)


@dataclass(frozen=True)
class Charts(Block):
    """Charts side by side, those of `more` folded below."""

    kind: ClassVar[str] = "charts"
    charts: list[Chart]
    more: list[Chart] = field(default_factory=list)


@dataclass(frozen=True)
class Picture(Block):
    """A picture inside the page, `source` being a data: address, with a caption."""

    kind: ClassVar[str] = "picture"
    source: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: its content.
        small: a second line.
        mark: "", "best", "better" or "worse".
        head: whether it names its row.
    """

    text: str
    small: str = ""
    mark: str = ""
    head: bool = False


@dataclass(frozen=True)
class Table(Block):
    """A table: headings, rows of cells, and whether its columns are text (else numbers, at the right)."""

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: list[list[Cell]]
    textual: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Folded(Block):
    """Blocks, or plain text, behind a line that opens them."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: list[Any] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page: heading and blocks; one without blocks is left out."""

    title: str
    blocks: list[Any]


def picture(path: Path, alt: str, caption: str) -> Picture | Text:
    """A picture file as a block; a note instead if it is damaged."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            kind = "jpeg" if opened.format == "JPEG" else "png"
            if (
                opened.width > PICTURE_WIDTH
                or len(content) > PICTURE_BYTES
                or opened.format not in ("PNG", "JPEG")
            ):
                image = opened.convert("RGB")
                image.thumbnail((PICTURE_WIDTH, 16 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, "jpeg", quality=88, subsampling=0)
                content, kind = buffer.getvalue(), "jpeg"
            else:
                opened.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Text(f"The picture {path.name} cannot be shown: {error}", note=True)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", alt, caption)


def render(title: str, sections: Sequence[Section], lead: str = "", footer: str = "") -> str:
    """The page: title, a sentence below it (`lead`), sections, the last line (`footer`)."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    files = resources.files("spark.report")
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return template.render(
        title=title,
        lead=lead,
        footer=footer,
        sections=[section for section in sections if section.blocks],
        style=(files / "page.css").read_text(encoding="utf-8"),
        frame=frame,
    )


def write_page(path: str | Path, page: str) -> Path:
    """Write a page, whole or not at all; OSError if the disk refuses."""
    return write_whole(path, page.encode("utf-8", errors="replace"))
