"""Loading a state dict with every key accounted for: what was filled, what is missing, what does not belong."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spark.errors import UserError


@dataclass
class KeyReport:
    """Which tensors were loaded, and which were not and why.

    Attributes:
        source: Where the weights came from.
        loaded: Names that were filled from the file.
        missing: Names the file lacks; they keep their initial values.
        unexpected: Names in the file that the model lacks.
        mismatched: (name, shape in the file, shape in the model).
        ignored: (name in the file, why it is not wanted).
    """

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """One line a kind of key; kinds without keys are left out."""
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.missing:
            lines.append(
                f"  missing, left at their initial values ({len(self.missing)}): {some(self.missing)}"
            )
        lines += [f"  {difference}" for difference in self.differences()]
        for reason in dict.fromkeys(reason for _, reason in self.ignored):
            names = [name for name, why in self.ignored if why == reason]
            lines.append(f"  ignored, {reason} ({len(names)}): {some(names)}")
        return "\n".join(lines)

    def differences(self) -> list[str]:
        """What the file has and the model lacks, or has in another shape."""
        found = []
        if self.unexpected:
            found.append(f"{len(self.unexpected)} are not in the model ({some(self.unexpected)})")
        if self.mismatched:
            shapes = [
                f"{key}: {list(there)} in the file, {list(here)} here" for key, there, here in self.mismatched
            ]
            found.append(f"{len(shapes)} have another shape ({some(shapes, '; ')})")
        return found


def some(names: list[str], separator: str = ", ", count: int = 4) -> str:
    """The first few, and how many more there are."""
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more


def fit(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    source: str,
    name: str,
    advice: str,
    optional: Collection[str] = (),
    ignored: Collection[tuple[str, str]] = (),
) -> KeyReport:
    """Load tensors into a model, all or nothing: no needed tensor may be missing.

    Args:
        tensors: Under the names of the model. A shape may differ by axes of length 1 (a linear layer as a 1x1
            convolution).
        model: Filled in place, if the tensors fit.
        source: Where the tensors came from; this and the next two are for messages.
        name: What the model is.
        advice: What to do about tensors that do not fit.
        optional: Parameters that may be missing, with all else of their module, and keep their initial values.
        ignored: (name, reason) of what was left out before.

    Raises:
        UserError: The tensors are those of another architecture; the first differences are named.
    """
    own = model.state_dict()
    report = KeyReport(source, ignored=list(ignored))
    state: dict[str, Tensor] = {}
    for key, target in own.items():
        value = tensors.get(key)
        if value is None:
            report.missing.append(key)
        elif _squeezed(value) != _squeezed(target):
            report.mismatched.append((key, tuple(value.shape), tuple(target.shape)))
        else:
            state[key] = value.reshape(target.shape)
            report.loaded.append(key)
    report.unexpected = [key for key in tensors if key not in own]
    unneeded = {_module_of(key) for key in optional}
    needed = [
        key
        for key in report.missing
        if _module_of(key) not in unneeded and not key.endswith(".num_batches_tracked")
    ]
    if needed or report.unexpected or report.mismatched:
        wrong = [f"{len(needed)} tensors are missing in the file ({some(needed)})"] if needed else []
        wrong += report.differences()
        raise UserError(
            f"{source} does not fit {name}: {', '.join(wrong)}. It is of another architecture, or not whole. {advice}"
        )
    # What is sharded takes part in the loading of every process, in the same order.
    model.load_state_dict(
        {key: placed(value, own[key]) if is_sharded(own[key]) else value for key, value in state.items()},
        strict=False,
    )
    return report


def _module_of(key: str) -> str:
    """Name of the module that a parameter or buffer belongs to."""
    return key.rpartition(".")[0]


def _squeezed(tensor: Tensor) -> list[int]:
    """Shape without axes of length 1."""
    return [size for size in tensor.shape if size != 1]


def placed(whole: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as another of its shape lies: sharded likewise, or in memory likewise.

    Every process calls it where the target is sharded; the values of process 0 count.
    """
    if not is_sharded(target):
        return torch.empty_like(target, dtype=whole.dtype).copy_(whole)
    from torch.distributed.tensor import distribute_tensor

    where: Any = target
    return distribute_tensor(whole.to(where.device), where.device_mesh, where.placements)


def is_sharded(value: Any) -> bool:
    """Whether a value is a `DTensor`, by its marks: older versions of torch keep the class elsewhere."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")
