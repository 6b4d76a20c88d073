"""Which evaluator acts on the records of a family of protocols."""

from collections.abc import Mapping
from types import MappingProxyType

from finetune.protocols import Protocol
from finetune.scoring.depth import DepthEvaluator
from finetune.scoring.evaluator import Evaluator
from finetune.scoring.ibims import IBimsEvaluator
from finetune.scoring.pairwise import OrdinalEvaluator

EVALUATORS: Mapping[str, type[Evaluator]] = MappingProxyType(
    {"depth": DepthEvaluator, "relations": OrdinalEvaluator, "ibims": IBimsEvaluator}
)
"""`Protocol.family` -> class."""


def evaluator_of(protocol: Protocol, *, skip_empty: bool = False) -> Evaluator:
    """An evaluator that has scored nothing yet."""
    return EVALUATORS[protocol.family](protocol, skip_empty=skip_empty)
