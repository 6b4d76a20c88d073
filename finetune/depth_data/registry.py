"""Find out what lies at a data root, and open it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from finetune.depth_data.base import DepthSet, OpenOptions
from finetune.depth_data.lists import LABELED_MAT, WITHOUT_LISTS, existing_root, lists_text
from finetune.depth_data.sets.densedepth import DenseDepth
from finetune.depth_data.sets.diw import DIW
from finetune.depth_data.sets.fastdepth import FastDepth, HubTars
from finetune.depth_data.sets.folder import PlainFolder
from finetune.depth_data.sets.ibims import IBims
from finetune.depth_data.sets.kitti import KITTI
from finetune.depth_data.sets.nyu import NYULabeled, NYUSync
from finetune.depth_data.sets.nyu_pairs import NYUPairs
from finetune.depth_data.sets.redweb import ReDWeb
from finetune.options import Kind
from spark.errors import UserError

KINDS: Mapping[Kind, type[DepthSet]] = MappingProxyType(
    {
        "nyu_labeled": NYULabeled,
        "densedepth": DenseDepth,
        "hub_tars": HubTars,
        "fastdepth": FastDepth,
        "diw": DIW,
        "nyu_pairs": NYUPairs,
        "redweb": ReDWeb,
        "ibims": IBims,
        "kitti": KITTI,
        "folder": PlainFolder,
        "nyu_sync": NYUSync,
    }
)
"""Name in a configuration -> data set, in the order in which a root is asked for them."""
assert set(KINDS) == set(get_args(Kind)), "Kind and KINDS must name the same layouts"

LABELLED: frozenset[Kind] = frozenset({"nyu_labeled", "nyu_sync"})
"""Layouts with class labels."""


def recognise(root: str | Path, list: str | Path | None = None) -> Kind:
    """The layout that lies at `root`.

    Raises:
        ValueError: none that is known, with what was looked for.
    """
    root = Path(root)
    if root.is_file() and list is not None and root.suffix != ".zip":
        remedy = f"; {WITHOUT_LISTS}" if root.suffix == ".mat" else ""
        raise UserError(
            f"{root} is a file, and a list of pairs needs a folder: give one or the other{remedy}"
        )
    if not root.is_file():
        root = existing_root(root)
    for kind, data in KINDS.items():
        if data.recognises(root, list):
            return kind
    raise UserError(
        f"no list of pairs was given and {root} holds no {LABELED_MAT}, nor another layout that is known"
        f" ({', '.join(KINDS)}; docs/use/depth_data.md): name the list file (data.list). {lists_text(root)}"
    )


def open_depth_data(
    root: str | Path,
    list: str | Path | None = None,
    split: Literal["train", "test"] = "train",
    *,
    kind: Kind | None = None,
    **options: Any,
) -> DepthSet:
    """Open a data set; `repr` of the result names the layout.

    Args:
        root: folder or file that the layout has.
        list: list of the pairs; a list is the split, where one is given.
        split: which official split, where the layout has them.
        kind: the layout; None recognises it, see `recognise`.
        options: the other fields of `OpenOptions`.

    Raises:
        ValueError: nothing that is known is there, with what was looked for; classes of a layout that has none; or what
            the data set of that kind raises.
    """
    chosen = OpenOptions(list, split, **options)
    if kind is None:
        kind = recognise(root, list)
    elif kind not in KINDS:
        raise UserError(f"data.kind must be one of {', '.join(KINDS)}, not {kind}")
    elif not Path(root).exists():
        raise UserError(f"no folder {root}: data.root must be where the layout {kind} lies")
    if chosen.labels is not None and kind not in LABELLED:
        raise UserError(
            f"the layout {kind} has no class labels, only {', '.join(sorted(LABELLED))} have: give data.labels null"
        )
    data = KINDS[kind].opened(Path(root), chosen)
    data.options = chosen
    return data
