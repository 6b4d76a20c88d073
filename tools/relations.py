"""Files in the layout of Depth in the Wild from NYU pairs: one relation a picture, of two points of measured depth.

    python -m tools.relations NYU FOLDER

The depths of the two points differ by more than 2 %. NYU is in the BTS "sync" layout, with nyu_train.txt and
nyu_val.txt; FOLDER gets DIW_train_val.csv, DIW_test.csv and copies of the pictures.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from finetune.depth_data import NYUSync
from spark.errors import UserError
from spark.files import write_whole
from spark.seeds import derive_seed

RATIO = 1.02
"""Two measured depths at least this far apart make a relation."""


def write_diw(nyu: Path, folder: Path) -> None:
    """DIW_train_val.csv and DIW_test.csv, the last one last."""
    for list_file, csv in (("nyu_train.txt", "DIW_train_val.csv"), ("nyu_val.txt", "DIW_test.csv")):
        lines = []
        data = NYUSync(nyu, list_file)
        for index, name in enumerate(data.names()):
            sample = data[index]
            pair = draw_relation(sample.metres, np.random.default_rng(derive_seed(0, index)))
            if pair is None:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(nyu / name, folder / name)
            height, width = sample.metres.shape
            lines += [f"./{name}", ",".join(map(str, (*pair, width, height)))]
        if not lines:
            raise UserError(f"no pair of {nyu / list_file} has two depths that differ by {RATIO - 1:.0%}")
        write_whole(folder / csv, ("\n".join(lines) + "\n").encode())


def draw_relation(
    depth: np.ndarray, rng: np.random.Generator, tries: int = 100
) -> tuple[int, int, int, int, str] | None:
    """Two random pixels with readings whose depths differ: (yA, xA, yB, xB), counted from 1, and > where A is farther.

    None where none was found.
    """
    known = np.argwhere(depth > 0)
    for a, b in rng.integers(0, max(len(known), 1), (tries if len(known) else 0, 2)):
        (ya, xa), (yb, xb) = known[a].tolist(), known[b].tolist()
        one, other = depth[ya, xa], depth[yb, xb]
        if max(one, other) > RATIO * min(one, other):
            return ya + 1, xa + 1, yb + 1, xb + 1, ">" if one > other else "<"
    return None


if __name__ == "__main__":
    write_diw(Path(sys.argv[1]), Path(sys.argv[2]))
