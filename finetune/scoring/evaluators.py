"""The evaluators by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from finetune.protocols import Protocol
from finetune.scoring.classes import CLASS_AGGREGATES, Aggregate
from finetune.scoring.depth import DepthEvaluator
from finetune.scoring.evaluator import Evaluator
from finetune.scoring.ibims import IBimsEvaluator
from finetune.scoring.pairwise import OrdinalEvaluator

EVALUATORS: Mapping[str, type[Evaluator]] = MappingProxyType(
    {"depth": DepthEvaluator, "relations": OrdinalEvaluator, "ibims": IBimsEvaluator}
)
"""`Protocol.family` -> class."""


AGGREGATES: Mapping[str, Aggregate] = MappingProxyType(
    {**{name: one.aggregate for name, one in EVALUATORS.items()}, **CLASS_AGGREGATES}
)
"""`family` of the settings of results -> metrics from rows, see `Evaluator.aggregate`."""


def evaluator_class(protocol: Protocol | Mapping[str, Any]) -> type[Evaluator]:
    """The evaluator of a protocol, or of the `settings` of results; that of depth where older results do not say."""
    if isinstance(protocol, Protocol):
        return EVALUATORS[protocol.family]
    return EVALUATORS.get(protocol.get("family", "depth"), DepthEvaluator)


def evaluator_of(protocol: Protocol, *, skip_empty: bool = False) -> Evaluator:
    """A new evaluator that has scored nothing yet."""
    return evaluator_class(protocol)(protocol, skip_empty=skip_empty)
