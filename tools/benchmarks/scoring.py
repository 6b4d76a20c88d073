"""What it costs to score predictions, without making them: the arithmetic of protocols on whole frames."""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from finetune.depth_data.sample import DepthSample
from finetune.protocols import Protocol, get_protocol
from finetune.scoring.depth import DepthEvaluator
from finetune.scoring.evaluators import evaluator_class, evaluator_of
from finetune.scoring.intervals import with_intervals
from spark.errors import UserError
from spark.sparse.choice import device_name
from tools.benchmarks.rows import Command, Row, versions
from tools.benchmarks.timing import interleaved, summary

DIFFERENT = 16  # frames that are made up; what is scored goes through them again and again
FRAME = (480, 640)


def scoring_rows(
    names: Sequence[str], images: int, size: tuple[int, int], rounds: int, threads: int = 1
) -> list[Row]:
    """A row for each protocol: seconds of scoring all images, bootstrap intervals included.

    Frames of ground truth are 480x640 with a tenth of their pixels without a reading; nothing is read from files, and
    nothing is computed in parallel but by the resize of predictions of another size.

    Args:
        names: of protocols that score maps of depth on such frames.
        images: how many are scored in a turn.
        size: (H, W) of the predictions [px].
        rounds: timed turns of each protocol.
        threads: of PyTorch.

    Raises:
        ValueError: no such protocol, or one that needs other ground truth.
    """
    protocols = [get_protocol(name) for name in names]
    for protocol in protocols:
        if evaluator_class(protocol) is not DepthEvaluator or protocol.data not in ("nyu", "any"):
            raise UserError(f"protocol {protocol.name} is not for frames of NYU with depth: name one that is")
    torch.set_num_threads(threads)
    pairs = made_up_pairs(size)
    seconds = interleaved(
        {one.name: partial(score_images, one, pairs, images) for one in protocols}, rounds, "cpu"
    )
    return [
        {
            "kind": "scoring",
            "contender": name,
            "base": names[0],
            "images": str(images),
            "height": str(size[0]),
            "width": str(size[1]),
            "threads": str(torch.get_num_threads()),
            "device": device_name("cpu"),
            **summary(times, seconds[names[0]], images),
            "rounds": str(rounds),
            **versions(),
        }
        for name, times in seconds.items()
    ]


def made_up_pairs(size: tuple[int, int]) -> list[tuple[DepthSample, np.ndarray]]:
    """Frames with depth between 1 and 9 m and predictions of (H, W) `size`; time does not depend on the values."""
    random = np.random.default_rng(0)
    pairs = []
    for index in range(DIFFERENT):
        depth = random.uniform(1, 9, FRAME).astype(np.float32)
        depth[random.random(FRAME) < 0.1] = 0
        sample = DepthSample(np.zeros((*FRAME, 3), np.uint8), depth, str(index))
        pairs.append((sample, random.uniform(1, 9, size).astype(np.float32)))
    return pairs


def score_images(protocol: Protocol, pairs: Sequence[tuple[DepthSample, np.ndarray]], images: int) -> None:
    """Score as `finetune/evaluate.py` does."""
    evaluator = evaluator_of(protocol)
    for index in range(images):
        sample, prediction = pairs[index % len(pairs)]
        evaluator.add(DepthSample(sample.image, sample.depth, str(index)), prediction)
    with_intervals(evaluator.results())


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    about = "names of protocols of NYU (%(default)s); ratios are over the first"
    parser.add_argument("--protocol", nargs="+", default=["nyu-bts"], help=about)
    parser.add_argument("--images", type=int, default=654, help="images of a turn (%(default)s)")
    about = "size of the predictions [px]; ground truth has 480x640 (480 640)"
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(480, 640), help=about)


COMMANDS = {
    "scoring": Command(
        "seconds that scoring predictions takes under a protocol, without making them or reading files",
        add_options,
        lambda o: iter([scoring_rows(o.protocol, o.images, tuple(o.size), o.rounds, o.threads)]),
    )
}
