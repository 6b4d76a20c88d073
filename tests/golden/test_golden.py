"""What the code computes is what it computed before: bit for bit on the machine of the file, closely on others.

A difference is a mistake, or it is wanted: then `python -m tests.golden.write NAMES` writes the new numbers, and the
commit says why they are others.
"""

from pathlib import Path

import pytest

from tests.golden.cases import CASES
from tests.golden.compare import differences, read, same_machine


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, some in CASES.items() for case in some])
def test_nothing_has_changed(name: str, case: str, tmp_path: Path) -> None:
    written = read(name)
    tolerance = None if same_machine(written["origin"]) else written["tolerance"]
    lines = differences(written["cases"][case], CASES[name][case](tmp_path), tolerance, case)
    assert not lines, "\n".join(
        [f"{len(lines)} differ from commit {written['origin']['commit']}", *lines[:40]]
    )


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_written(name: str) -> None:
    assert read(name)["cases"].keys() == CASES[name].keys()
