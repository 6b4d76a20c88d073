"""Find out what lies at a data root, and open it."""

from pathlib import Path
from typing import Literal

from finetune.depth_data.nyu import (
    LABELED_MAT,
    WITHOUT_LISTS,
    NYULabeled,
    NYUSync,
    WhiteBorder,
    existing_root,
    lists_text,
)


def open_depth_data(
    root: str | Path,
    list: str | Path | None = None,
    split: Literal["train", "test"] = "train",
    *,
    depth: Literal["raw", "filled"] = "raw",
    white_border: WhiteBorder = "keep",
) -> NYUSync | NYULabeled:
    """Open RGB-D pairs; `repr` of the result says which layout was taken.

    - a list is given: the BTS "sync" layout. The list is the split; `split` and `depth` say nothing there,
      because a list file and its depth maps are what they are.
    - no list, and `root` is a .mat file or a folder that holds nyu_depth_v2_labeled.mat: the official
      labelled file with splits.mat beside it.

    Args:
        root: folder of the scenes, or of the labelled file, or the labelled file itself.
        list: list file of RGB-D pairs: a name inside `root`, or a path, see `nyu.find_list`.
        split: which official split of the labelled file.
        depth: "raw" (with holes) or "filled" depth of the labelled file.
        white_border: what becomes of the white border of the labelled images, see `paint_border`.

    Raises:
        ValueError: nothing of the above is there, with what was looked for; or what `NYUSync` and
            `NYULabeled` raise.
    """
    root = Path(root)
    if root.is_file() and list is not None:
        remedy = f"; {WITHOUT_LISTS}" if root.suffix == ".mat" else ""
        raise ValueError(
            f"{root} is a file, and a list of pairs needs a folder: give one or the other{remedy}"
        )
    if root.is_file():
        return NYULabeled(root, split=split, depth=depth, white_border=white_border)
    root = existing_root(root)
    if list is not None:
        return NYUSync(root, list, white_border=white_border)
    if (root / LABELED_MAT).is_file():
        return NYULabeled(root / LABELED_MAT, split=split, depth=depth, white_border=white_border)
    raise ValueError(
        f"no list of pairs was given and {root} holds no {LABELED_MAT}: name the list file (data.list)."
        f" {lists_text(root)}"
    )
