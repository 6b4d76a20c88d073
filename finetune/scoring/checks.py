"""Whether a protocol can be scored: on a data set, and with the predictions that there are."""

from collections.abc import Mapping, Sequence

from finetune.depth_data import DepthFileError, DepthSet
from finetune.protocols import Protocol
from finetune.scoring.evaluators import evaluator_class
from finetune.scoring.sources import Source
from spark.errors import UserError

SUPERVISION = {"metric": "depth in metres", "ordinal": "relations of points", "affine": "relative depth"}


class OtherBenchmark(UserError):
    """A protocol of another data set than this."""


def check_benchmark(data: DepthSet, protocol: Protocol) -> None:
    """Refuse a protocol of another benchmark: OtherBenchmark."""
    if "any" not in (data.benchmark, protocol.data) and data.benchmark != protocol.data:
        raise OtherBenchmark(
            f"protocol {protocol.name} is of {protocol.data}, and this is {data.benchmark}: name one of"
            f" {data.benchmark}, or all"
        )


def check_ground_truth(data: DepthSet, protocol: Protocol) -> None:
    """Refuse to score on data without the ground truth that a protocol compares with.

    Raises:
        UserError: It has none, or of another size than the protocol takes, or names a pair twice, or the header of a
            file shows that it cannot be used.
    """
    if data.supervision != protocol.supervision:
        raise UserError(
            f"{data} has no {SUPERVISION[protocol.supervision]} to validate on or score against, only"
            f" {SUPERVISION[data.supervision]}: name data that has it, or a protocol for what it has (diw for"
            " relations, redweb for relative depth, nyu-wkdr-sampled for relations drawn from NYU's depth)"
        )
    first: dict[str, int] = {}
    for index, name in enumerate(data.names()):
        if (before := first.setdefault(name, index)) != index:
            raise UserError(
                f"{name}{data.origin(before)} is to be scored a second time{data.origin(index)}: name each pair once"
            )
    data.check_headers()  # a bad file must show now, not after the first epoch
    evaluator_class(protocol).check_sample(protocol, data[0])


def fitting_protocols(
    protocols: Sequence[Protocol], source: Source, sets: Mapping[str, DepthSet], *, by_name: bool
) -> tuple[list[Protocol], dict[str, str]]:
    """The protocols that fit data and predictions, and why each other one is left out.

    Args:
        protocols: to choose from.
        source: of the predictions.
        sets: the data by `Protocol.depth`.
        by_name: the user named the protocols, so every one must fit.

    Raises:
        UserError: one that must fit does not, or none does.
    """
    fit, left_out = [], {}
    for protocol in protocols:
        data = sets[protocol.depth]
        try:
            check_benchmark(data, protocol)
            source.check(protocol)
            check_ground_truth(data, protocol)
            fit.append(protocol)
        except DepthFileError:
            raise
        except UserError as error:
            if by_name:
                raise
            other = isinstance(error, OtherBenchmark)
            left_out[protocol.name] = (
                f"not of {data.benchmark}, which this data set is" if other else str(error)
            )
    if not fit:
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UserError(f"no protocol fits {next(iter(sets.values()))}: {reasons}")
    return fit, left_out
