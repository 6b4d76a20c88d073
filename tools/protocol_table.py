"""Write the table of the evaluation protocols into docs/protocols.md, from their records.

python tools/protocol_table.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.protocols import PROTOCOLS, Protocol
from finetune.scoring.depth import valid_text
from spark.files import write_whole

PAGE = Path(__file__).resolve().parents[1] / "docs" / "protocols.md"
BEGIN, END = "<!-- table: tools/protocol_table.py -->\n", "<!-- end of table -->\n"


def main(argv: list[str] | None = None) -> None:
    """Replace the table in the page."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(argv)
    write_whole(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())


def page(text: str) -> str:
    """The page with the table as the records have it."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def table() -> str:
    """A row of Markdown for each protocol, and a line with its source."""
    rows = [
        "| protocol | ground truth that counts | pixels | prediction | mean over | tables |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{name}` | {counted(one)} | {pixels(one)} | {prepared(one)} | "
        f"{'pixels' if one.aggregation == 'pooled' else 'images'} | {one.tables} |"
        for name, one in PROTOCOLS.items()
        if one.supervision == "metric" and not one.scores_pairs
    ]
    sources = [
        f"- `{name}`: {one.description}" + (f" Read in: {one.source}." if one.source else "")
        for name, one in PROTOCOLS.items()
    ]
    return "\n" + "\n".join(rows) + "\n\n" + "\n".join(sources) + "\n\n"


def counted(protocol: Protocol) -> str:
    """Which depths count."""
    named = protocol.data in ("nyu", "kitti")
    return f"{protocol.depth}, {valid_text(protocol)}" if named else valid_text(protocol)


def pixels(protocol: Protocol) -> str:
    """Which pixels count."""
    view = ", ".join(f"{step.replace('_', ' ')} {h}x{w}" for step, h, w in protocol.view)
    crop = ""
    if protocol.crop is not None:
        top, bottom, left, right = protocol.crop
        crop = f"{top}:{bottom}, {left}:{right}" + (", scaled" if protocol.scale_crop else "")
    elif protocol.crop_shares is not None:
        crop = "shares " + ", ".join(map(str, protocol.crop_shares))
    return "; ".join(filter(None, (view, crop))) or "all"


def prepared(protocol: Protocol) -> str:
    """What becomes of a prediction."""
    flips = "flip average" + (" of clipped ones" if protocol.clip_before_average else "")
    steps = [
        flips if protocol.flip_average else "",
        "sees the benchmark crop" if protocol.sees == "kb_crop" else "",
        "inverse depth" if protocol.space == "disparity" else "",
        "align_corners" if protocol.align_corners else "",
        f"fitted: {protocol.alignment}" if protocol.alignment != "none" else "",
        "" if protocol.clip else "not clipped",
    ]
    return ", ".join(filter(None, steps)) or "clipped at full size"


if __name__ == "__main__":
    main()
