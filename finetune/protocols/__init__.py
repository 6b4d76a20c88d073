"""Named evaluation protocols. Numbers of two protocols must not be compared.

On NYU the crop, the cap, flip averaging and pooling each move RMSE by more than separates published models. So a
protocol is a named record of all settings, with a hash that results carry; docs/use/protocols.md has the table. The
evaluator of its family applies it to arrays (`finetune.scoring.evaluators`).
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from finetune.protocols.ibims import IBIMS
from finetune.protocols.kitti import KITTI
from finetune.protocols.nyu import NYU
from finetune.protocols.pairs import PAIRS
from finetune.protocols.record import KB_SIZE, Protocol
from spark.errors import UserError

__all__ = ["KB_SIZE", "PROTOCOLS", "Protocol", "get_protocol"]

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {protocol.name: protocol for protocol in (*NYU, *KITTI, *PAIRS, *IBIMS)}
)
"""Every protocol by its name."""


def get_protocol(name: str, *, flip_average: bool | None = None, threshold: float | None = None) -> Protocol:
    """A protocol of the registry, with flip averaging and the threshold of pairs of points replaced where given.

    Raises:
        ValueError: no such protocol, or a threshold for one that has none.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no evaluation protocol {name!r}: {hint}known: {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if threshold is not None:
        if not protocol.scores_pairs:
            relations = ", ".join(key for key, each in PROTOCOLS.items() if each.scores_pairs)
            raise UserError(f"threshold is for relations of points ({relations}), not {name}: leave it out")
        protocol = replace(protocol, threshold=threshold)
    return protocol if flip_average is None else replace(protocol, flip_average=flip_average)
