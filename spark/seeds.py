"""Where every random number of a run comes from: the seed of the run, a purpose, and a position."""

import hashlib
import struct
from enum import IntEnum


class Purpose(IntEnum):
    """What a seed is for, the last part of `derive_seed`, so that no two uses share random numbers.

    The augmentation of a sample is the one use without a purpose: `derive_seed(seed, position)`.
    """

    MASK = 1
    ORDER = 2  # of a pass over the samples
    WEIGHTS = 3  # of a pretraining model
    STEP = 4  # dropout and stochastic depth of a micro-batch
    MASK_RATIO = 5
    SIZE = 6  # of the images of a step
    SHARDS = 7  # order of shards in a streamed pass
    BUFFER = 8  # shuffle buffer of a stream
    ENCODER_WEIGHTS = 10  # of a depth model
    HEAD_WEIGHTS = 11
    LOSS_WEIGHTS = 12  # modules that a loss owns
    SET = 13  # one of several sets that train together


def derive_seed(*parts: int) -> int:
    """Mix integers into one seed of 63 bits, the same on every machine and in every process.

    What a sample looks like depends on where it stands in the stream, and not on workers, on ranks, or on where a run
    was interrupted.

    Args:
        parts: any number of integers between -2**63 and 2**63 - 1; the seed of the run first, a `Purpose` last.

    Returns:
        An integer between 0 and 2**63 - 1, which every ``manual_seed`` takes.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
