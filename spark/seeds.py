"""Where every seed of a run comes from."""

import hashlib
import struct


def derive_seed(*parts: int) -> int:
    """Mix integers into one seed of 63 bits, the same on every machine and in every process.

    Every random number of a run is drawn from a seed such as ``derive_seed(seed, position)``. So what a sample looks
    like depends on where it stands in the stream, and not on workers, on ranks, or on where a run was interrupted.

    Args:
        parts: any number of integers between -2**63 and 2**63 - 1.

    Returns:
        An integer between 0 and 2**63 - 1, which every ``manual_seed`` takes.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
