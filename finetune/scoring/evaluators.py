"""The evaluators by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from finetune.protocols import Protocol
from finetune.scoring.classes import ClassifiedPhotos, SegmentedImages
from finetune.scoring.depth import DepthEvaluator
from finetune.scoring.evaluator import Evaluator, Measure
from finetune.scoring.ibims import IBimsEvaluator
from finetune.scoring.pairwise import OrdinalEvaluator

EVALUATORS: Mapping[str, type[Evaluator]] = MappingProxyType(
    {"depth": DepthEvaluator, "relations": OrdinalEvaluator, "ibims": IBimsEvaluator}
)
"""`Protocol.family` -> class."""

MEASURES: Mapping[str, type[Measure]] = MappingProxyType(
    {**EVALUATORS, "classification": ClassifiedPhotos, "segmentation": SegmentedImages}
)
"""`family` in the settings of results -> class; of those that no protocol has, training writes the results."""


def evaluator_class(protocol: Protocol) -> type[Evaluator]:
    """The evaluator of a protocol."""
    return EVALUATORS[protocol.family]


def measure_of(settings: Mapping[str, Any]) -> type[Measure]:
    """The measure of results, by their `settings`; that of depth where older results do not say."""
    return MEASURES.get(settings.get("family", "depth"), DepthEvaluator)


def evaluator_of(protocol: Protocol, *, skip_empty: bool = False) -> Evaluator:
    """A new evaluator that has scored nothing yet."""
    return evaluator_class(protocol)(protocol, skip_empty=skip_empty)
