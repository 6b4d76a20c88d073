"""Several data sets in one run: shares, order, exact resume, and what a batch holds."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from finetune.depth_data import (
    MixedSampler,
    MixedSet,
    TrainingMix,
    TrainTransform,
    collate_depth,
    open_depth_data,
)
from finetune.depth_data.mixing import take_turns
from spark.training.sampling import StreamSampler
from tests import depth_layouts as write

SMALL = TrainTransform(image_size=(24, 32), crop_size=(16, 24), border=None)


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> TrainingMix:
    root = tmp_path_factory.mktemp("sets")
    roots = write.write_sync(root / "a"), write.write_diw(root / "b"), write.write_redweb(root / "c")
    lists = ("nyu_train.txt", None, None)
    sets = [
        MixedSet(name, open_depth_data(where, list_file), SMALL, weight)
        for name, where, list_file, weight in zip(
            ("nyu", "diw", "redweb"), roots, lists, (2, 1, 1), strict=True
        )
    ]
    return TrainingMix(sets, seed=5)


def test_turns_by_hand() -> None:
    assert take_turns([0.75, 0.25], 8) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert take_turns([0.5, 0.5], 4) == [0, 1, 0, 1]
    assert take_turns([1.0], 3) == [0, 0, 0]
    assert take_turns([1 / 3] * 3, 6) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("weights", [(5, 3, 1), (0.7, 0.2, 0.1), (1, 1000)])
def test_shares_hold_at_every_point(weights: tuple[float, ...]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    turns = take_turns(shares, 2000)
    for end in range(1, 2001, 7):
        had = Counter(turns[:end])
        assert all(abs(had[number] - share * end) <= 1 for number, share in enumerate(shares))
    assert take_turns(shares, 50) == turns[:50]  # what comes later changes nothing before


def test_each_set_has_its_own_stream(mix: TrainingMix) -> None:
    """Every pass over a set has each of its samples once, whatever its weight."""
    batches = list(MixedSampler(mix, 2, stop=16))
    assert [batch[0][0] for batch in batches[:4]] == [0, 1, 2, 0]
    for number in range(3):
        positions = [(p, i) for batch in batches for n, p, i in batch if n == number]
        assert [p for p, _ in positions] == list(range(len(positions)))
        assert sorted(i for _, i in positions[:4]) == [0, 1, 2, 3]
    first = [entry for batch in StreamSampler(4, 2, seed=5, stop=8) for entry in batch]
    assert [(p, i) for batch in batches for n, p, i in batch if n == 0] == first
    orders = [tuple(i for batch in batches for n, _, i in batch if n == number) for number in range(3)]
    assert orders[1] != orders[2]  # the sets have seeds of their own


def test_a_stream_can_begin_anywhere_and_be_divided(mix: TrainingMix) -> None:
    whole = list(MixedSampler(mix, 2, stop=20))
    for start in (1, 7, 19, 20):
        assert list(MixedSampler(mix, 2, start=start, stop=20)) == whole[start:]
    halves = [list(MixedSampler(mix, 1, rank=rank, world_size=2, stop=20)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*halves, strict=True)] == whole


def test_batches_have_the_targets_of_their_set(mix: TrainingMix) -> None:
    loader = DataLoader(mix, batch_sampler=MixedSampler(mix, 2, stop=4), collate_fn=collate_depth)
    batches: list[dict[str, Any]] = list(loader)
    kinds = [(*set(batch["set"]), *set(batch["supervision"])) for batch in batches]
    assert kinds == [("nyu", "metric"), ("diw", "ordinal"), ("redweb", "affine"), ("nyu", "metric")]
    nyu, diw, redweb, _ = (
        {key for key, value in batch.items() if torch.is_tensor(value)} for batch in batches
    )
    common = {"image", "position", "index"}
    assert nyu == common | {"depth", "valid"}
    assert diw == common | {"pairs", "relation", "pairs_valid"}
    assert redweb == common | {"affine", "affine_valid"}
    assert mix.entries() == (nyu | diw | redweb) - {"position", "index"}
    assert batches[1]["pairs"].shape == (2, 1, 4)
    assert len(mix) == 12
    assert len(set(mix.names())) == 12


def test_batches_do_not_depend_on_workers(mix: TrainingMix) -> None:
    serial, parallel = (
        list(
            DataLoader(
                mix, batch_sampler=MixedSampler(mix, 2, stop=6), collate_fn=collate_depth, num_workers=n
            )
        )
        for n in (0, 2)
    )
    for here, there in zip(serial, parallel, strict=True):
        assert here.keys() == there.keys()
        assert here["name"] == there["name"]
        assert torch.equal(here["image"], there["image"])
