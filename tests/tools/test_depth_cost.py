"""tools/depth_cost.py: counted parameters are the published ones, counted multiplications those of a convolution."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # as when a tool is run as a script

import depth_cost


def test_counts(tmp_path: Path) -> None:
    convolution = nn.Conv2d(4, 6, 3, padding=1, device="meta")
    assert depth_cost.count_macs(convolution, torch.empty(1, 4, 10, 20, device="meta")) == 10 * 20 * 4 * 6 * 9

    depth_cost.main(["--output", str(tmp_path / "cost.csv")])
    rows = {row["config"]: row for row in csv.DictReader((tmp_path / "cost.csv").read_text().splitlines())}
    assert set(rows) == {card.stem for card in depth_cost.CARDS.glob("*.yaml")}
    assert rows["lraspp_nyu"]["parameters_M"] == "3.22"
    assert rows["unetpp_resnext50"]["parameters_M"] == "48.46"
    assert rows["zoedepth_swinv2"]["encoder"] == "swinv2_base_window12to24_192to384"
    assert float(rows["zoedepth_distil"]["training_only_parameters_M"]) == 2.88
    # Two 3x3 convolutions at each size of 384x512, the first on the scale above and the core's 256 channels.
    widths, skips = (256, 256, 128, 64, 32, 16), (256, 256, 256, 256, 0)
    macs = 16 * 13 * 9 * 384 * 512
    for block, (above, skip, width) in enumerate(zip(widths[:-1], skips, widths[1:], strict=True)):
        macs += (above + skip + width) * width * 9 * (384 * 512 // 4 ** (4 - block))
    assert float(rows["zoedepth_distil"]["training_only_gmacs"]) == pytest.approx(macs / 1e9, abs=0.01)
    for name, row in rows.items():
        assert float(row["gmacs"]) > 0
        assert (float(row["training_only_gmacs"]) > 0) == (name == "zoedepth_distil")
