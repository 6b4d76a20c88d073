"""Which evaluator acts on the records of a family of protocols."""

from collections.abc import Mapping
from types import MappingProxyType

from finetune.evaluator import Evaluator
from finetune.ibims import IBimsEvaluator
from finetune.ordinal import OrdinalEvaluator
from finetune.protocols import Protocol
from finetune.scoring import DepthEvaluator

EVALUATORS: Mapping[str, type[Evaluator]] = MappingProxyType(
    {"depth": DepthEvaluator, "relations": OrdinalEvaluator, "ibims": IBimsEvaluator}
)
"""`Protocol.family` -> class."""


def evaluator_of(protocol: Protocol, *, skip_empty: bool = False) -> Evaluator:
    """An evaluator that has scored nothing yet."""
    return EVALUATORS[protocol.family](protocol, skip_empty=skip_empty)
