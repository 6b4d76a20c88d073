"""Whether contenders compute the same: nothing is measured before they do."""

from dataclasses import replace

import torch
from torch import Tensor

from spark.errors import UserError
from tools.benchmarks.contenders import ORIGINAL_DECODER, Bench, Case, Contender

# Relative. In fp64 all is compared; in the timed precision only results, against a path that is wrong there alone: one
# ReLU that rounding flips moves gradients of fp32 by more than a small fault would.
_TOLERANCE = {"fp64": 1e-6, "fp32": 1e-3, "bf16": 1e-1}


def check_parity(bench: Bench, kind: str) -> None:
    """Speed of a wrong result is no speed: compare loss or features, and gradients.

    Checked in fp64, where equal semantics give equal numbers, and loosely, without gradients and without TF32, each in
    the precision that it is timed in. Numbers are compared with those of the base: |a - b| / |b|, norms over a whole
    tensor.

    Raises:
        ValueError: contenders differ, or one gives no finite number; it says who, in what and by how much.
    """
    for exact in (True, False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            results = {
                name: (_exact_numbers if exact else _numbers)(bench, contender, kind)
                for name, contender in bench.contenders.items()
                if contender.decoder == bench.case.decoder
            }
        base = next(iter(results))
        for name, numbers in results.items():
            precision = "fp64" if exact else bench.contenders[name].precision
            tolerance = max(
                _TOLERANCE["fp64" if exact else bench.contenders[who].precision] for who in (name, base)
            )
            for what, value in numbers.items():
                if not value.isfinite().all():
                    raise UserError(
                        f"{bench.case.model}: {name} gives a {what} that is not finite in {precision}, so nothing is "
                        "measured"
                    )
                expected = results[base][what]
                error = ((value - expected).norm() / expected.norm()).item()
                if error > tolerance:
                    raise UserError(
                        f"{bench.case.model}: {name} and {base} differ in their {what} by {error:.1e} (relative, "
                        f"{precision}) on the same weights and mask, more than {tolerance:.0e}, so nothing "
                        "is measured"
                    )


def _numbers(bench: Bench, contender: Contender, kind: str) -> dict[str, Tensor]:
    """Results of a step by name, in the precision that is timed."""
    return _named(bench.forward(contender, kind))


def _exact_numbers(bench: Bench, contender: Contender, kind: str) -> dict[str, Tensor]:
    """Results and gradients of a step in fp64; those of parameters, which each names its own way, as one norm."""
    single = bench.images[contender.name]
    contender.model.double()
    images = bench.images[contender.name] = single.double().requires_grad_()
    outputs = bench.forward(contender, kind, "fp64")
    bench.backward(contender, outputs, "fp64")
    norms = [p.grad.norm() for p in contender.model.parameters() if p.grad is not None]
    assert images.grad is not None
    numbers = {
        **_named(outputs),
        "gradient of the images": images.grad,
        "gradient": torch.stack(norms).norm(),
    }
    contender.model.zero_grad(set_to_none=True)
    contender.model.float()  # back to the very weights it had
    bench.images[contender.name] = single
    return numbers


def _named(outputs: list[Tensor]) -> dict[str, Tensor]:
    names = ["loss"] if outputs[0].ndim == 0 else [f"features {i}" for i in range(len(outputs))]
    return {name: x.detach().double() for name, x in zip(names, outputs, strict=True)}


def checked(case: Case, kind: str) -> Bench:
    """Contenders of a case that give equal results.

    With another decoder than the original's, ours are first compared with it with its decoder, then with each other.

    Raises:
        ValueError: they differ, or the case does not fit the model.
    """
    if kind == "step" and case.has_original and case.decoder != ORIGINAL_DECODER:
        check_parity(Bench(replace(case, decoder=ORIGINAL_DECODER)), kind)
    bench = Bench(case)
    check_parity(bench, kind)
    return bench
