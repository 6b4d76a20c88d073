# ruff: noqa: F401, F811  (fixtures of another file)
"""Masks of blocks, ranges of the mask ratio, and sizes that change from step to step."""

import numpy as np
import pytest
import torch

from spark.config import PretrainConfig
from spark.images.batches import MaskedBatches, StepPlan
from spark.images.dataset import SampleReader
from spark.images.transform import PretrainTransform
from spark.model.masking import check_masks, random_visible, visible_at
from spark.model.spark import SparK
from spark.training.cli import config_dict, parse_config
from spark.training.log import read_rows
from tests.spark.test_pretrain import (
    assert_equal,
    command,
    curve,
    error_of,
    fresh_accelerate,
    photos,
    run,
    weights,
)


def whole_blocks(visible, block):
    """Blocks that are cut by the border of visible and masked, at the best of all offsets; visible: [fh, fw] bool."""
    fh, fw = visible.shape
    return min(
        sum(
            0 < cell.sum() < cell.numel()
            for y in range(-top, fh, block)
            for x in range(-left, fw, block)
            for cell in [visible[max(y, 0) : y + block, max(x, 0) : x + block]]
        )
        for top in range(block)
        for left in range(block)
    )


@pytest.mark.parametrize(
    ("grid", "block", "ratio"), [((7, 7), 2, 0.6), ((7, 9), 3, 0.6), ((12, 12), 4, 0.75)]
)
def test_masks_of_blocks(grid, block, ratio):
    keep = round(grid[0] * grid[1] * (1 - ratio))
    masks = visible_at(range(300), grid, ratio, seed=3, block=block)
    assert masks.shape == (300, 1, *grid)
    assert masks.flatten(1).sum(1).tolist() == [keep] * 300, "as many visible patches in each image as ever"
    assert max(whole_blocks(mask[0], block) for mask in masks[:40]) <= 1, "at most one block is cut"
    single = visible_at(range(300), grid, ratio, seed=3)
    assert min(whole_blocks(mask[0], block) for mask in single[:40]) > 1
    share = masks.double().mean((0, 1))
    assert (share - keep / masks[0].numel()).abs().max() < 0.13, "every patch about equally often"
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 290, "drawn anew for each image"
    assert torch.equal(visible_at([7, 5], grid, ratio, 3, block=block), masks[[7, 5]]), "by position alone"
    drawn = random_visible(20, grid, ratio, block=block, generator=torch.Generator().manual_seed(0))
    assert drawn.flatten(1).sum(1).tolist() == [keep] * 20
    assert max(whole_blocks(mask[0], block) for mask in drawn) <= 1


def test_masks_of_single_patches_are_those_of_before():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    kept = noise <= noise.sort(1).values[:, 4:5]
    assert torch.equal(random_visible(3, (3, 4), 0.6, generator=generator), kept.view(3, 1, 3, 4))


@pytest.mark.parametrize(
    ("grid", "ratio", "block", "message"),
    [
        ((4, 4), (0.7, 0.5), 1, "no range: give the lower share first"),
        ((4, 4), (0.5, 0.99), 1, "mask_ratio 0.99 on a grid of 4x4 patches would leave 0 of 16 visible"),
        ((4, 4), (0.01, 0.5), 1, "mask_ratio 0.01 .* leave 16 of 16"),
        ((4, 7), 0.6, 4, "mask_block_size 4 must be at least 1 and, unless it is 1, below 4"),
        ((4, 7), 0.6, 0, "mask_block_size 0 must be at least 1"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(grid, ratio, block, message):
    with pytest.raises(ValueError, match=message):
        check_masks(grid, ratio, block)
    with pytest.raises(ValueError, match=message):
        SparK("test_resnet", (32 * grid[0], 32 * grid[1]), ratio, mask_block_size=block, decoder_width=32)


def test_a_model_draws_from_its_range_and_blocks():
    model = SparK("test_resnet", 128, (0.3, 0.7), mask_block_size=2, decoder_width=32).eval()
    counts = set()
    with torch.no_grad():
        for _ in range(12):
            visible = model(torch.zeros(3, 3, 128, 128)).visible
            assert len(set(visible.flatten(1).sum(1).tolist())) == 1, "one number for all images"
            assert max(whole_blocks(mask[0], 2) for mask in visible) <= 1
            counts.add(int(visible[0].sum()))
    assert len(counts) > 2
    assert 5 <= min(counts) <= max(counts) <= 11
    assert model.layout_on("cpu", "fp32").reason == "as named"


def test_steps_draw_uniformly_and_by_position():
    sizes = ((64, 64), (96, 64), (128, 128))
    plan = StepPlan(sizes, (0.4, 0.8), batch_size=8, seed=1)
    drawn = [plan.size(step) for step in range(3000)]
    assert all(900 < drawn.count(size) < 1100 for size in sizes)
    ratios = torch.tensor([plan.ratio(step) for step in range(3000)])
    assert 0.4 <= ratios.min() < 0.41
    assert 0.79 < ratios.max() <= 0.8
    assert ratios.mean() == pytest.approx(0.6, abs=0.01)
    assert plan.step_of(7) == 0
    assert plan.step_of(8) == 1
    other = StepPlan(sizes, (0.4, 0.8), batch_size=8, seed=2)
    assert [other.size(step) for step in range(20)] != drawn[:20]
    assert StepPlan(sizes[:1], 0.6, 8, 1).ratio(5) == 0.6


def test_batches_have_the_size_and_the_ratio_of_their_step():
    sizes = ((64, 96), (128, 128))
    plan = StepPlan(sizes, (0.3, 0.7), batch_size=4, seed=0)
    reader, collate = SampleReader(PretrainTransform(32), seed=0, plan=plan), MaskedBatches(plan, 32)
    blank = (0, "x", lambda: np.zeros((64, 64, 3), np.uint8))
    seen = set()
    for step in range(12):
        halves = [
            collate([reader.first_readable([blank], 4 * step + i) for i in part]) for part in ((0, 1), (2, 3))
        ]
        shapes = {tuple(half["image"].shape[2:]) for half in halves}
        assert shapes == {plan.size(step)}, "over all processes and parts"
        h, w = plan.size(step)
        keep = round(h * w // 1024 * (1 - plan.ratio(step)))
        for half in halves:
            assert half["visible"].shape == (2, 1, h // 32, w // 32)
            assert half["visible"].flatten(1).sum(1).tolist() == [keep] * 2
        seen.add((h, keep))
    assert len(seen) > 4


def test_options_of_a_run(tmp_path):
    base = ["--model.name", "resnet18", "--data.train", "x", "--output_dir", "y"]
    config = parse_config(
        PretrainConfig, [*base, "--model.train_sizes", "[64,[96,64]]", "--model.mask_ratio", "[0.5,0.7]"], ""
    )
    assert config.model.train_sizes == (64, (96, 64))
    assert config.model.mask_ratio == (0.5, 0.7)
    plain = config_dict(config)["model"]
    assert (plain["train_sizes"], plain["mask_ratio"]) == ([64, [96, 64]], [0.5, 0.7])


MIXED = (
    "--model.train_sizes=[64,[64,96],96]",
    "--model.mask_ratio=[0.3,0.7]",
    "--accumulation=2",
    "--data.workers=1",
)


def test_a_run_of_changing_sizes_and_ratios_resumes_exactly(command, tmp_path, capsys):
    run(command(*MIXED, "--checkpoint_every=3", "--keep_checkpoints=3", "--panels_every=4", output="whole"))
    assert "64x64, 64x96, 96x96 px" in capsys.readouterr().out
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    plan = StepPlan(((64, 64), (64, 96), (96, 96)), (0.3, 0.7), 8, 0)
    assert [(row["height"], row["width"]) for row in rows] == [plan.size(step) for step in range(8)]
    assert len({row["width"] for row in rows}) == 2
    for step, row in enumerate(rows):
        patches = row["height"] * row["width"] // 1024
        assert row["mask_ratio"] == pytest.approx(1 - round(patches * (1 - plan.ratio(step))) / patches)
    start = tmp_path / "whole" / "checkpoints" / "step_0000003"
    run(command(*MIXED, f"--resume={start}", output="b"))
    assert curve(tmp_path / "b") == curve(tmp_path / "whole")[3:]
    assert_equal(weights(tmp_path / "b", 8), weights(tmp_path / "whole", 8))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.train_sizes=[64,100]", "image size 100x100 is no multiple of the patch size 32"),
        ("--model.train_sizes=[64,32]", "mask_ratio 0.6 on a grid of 1x1 patches"),
        ("--model.train_sizes=[]", "or null, got an empty list"),
        (
            "--model.train_sizes=[a]",
            "model.train_sizes must be a list [...] of entries",
        ),
        (
            "--model.mask_ratio=[0.7,0.5]",
            "model.mask_ratio must be a number between 0 and 1 or a list [...] of 2 numbers",
        ),
        ("--model.mask_block_size=2", "mask_block_size 2 must be at least 1 and, unless it is 1, below 2"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_anything_is_written(
    command, tmp_path, capsys, option, message
):
    assert message in error_of(capsys, command(option))
    assert not (tmp_path / "run").exists()
