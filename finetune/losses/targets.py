"""Names for what losses compare: the outputs of a model, and the targets that a batch holds or that follow from it.

`finetune.depth_data.sample` lists the entries of a batch.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.heads.output import DepthOutput


class Target(NamedTuple):
    """What a loss may compare with."""

    alternatives: tuple[tuple[str, ...], ...]
    """Entries of a batch, one group of which must be there."""

    read: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    """The tensors that the loss is given, from a batch that has one of the groups."""


def _disparity(batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Affine-invariant ground truth if the batch has it, else the inverse of metric depth; where it is valid."""
    if "affine" in batch:
        return batch["affine"], batch["affine_valid"]
    depth, valid = batch["depth"], batch["valid"]
    return torch.where(valid, depth, torch.ones_like(depth)).reciprocal(), valid


def _entries(*names: str) -> Target:
    return Target((names,), lambda batch: tuple(batch[name] for name in names))


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "depth": _entries("depth", "valid"),
        "disparity": Target((("depth", "valid"), ("affine", "affine_valid")), _disparity),
        "pairs": _entries("pairs", "relation", "pairs_valid"),
        "labels": _entries("labels"),
        "image": _entries("image"),
    }
)
"""Targets by name."""


def supplies(target: str, entries: Collection[str]) -> bool:
    """Whether a batch, or a sample, with these entries has a target."""
    return any(all(name in entries for name in names) for names in TARGETS[target].alternatives)


OUTPUTS: Mapping[str, Callable[[DepthOutput], Tensor | None]] = MappingProxyType(
    {
        "depth": lambda output: output.depth,
        "disparity": lambda output: output.disparity(),
        "disparity_affine": lambda output: output.disparity_affine,
        "segmentation": lambda output: output.segmentation,
    }
)
"""Name of an output of a model -> how to read it; None where the model's head does not give it."""
