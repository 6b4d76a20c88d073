"""What the Triton kernels of a training step become on a GPU, found without one.

A step on tensors without values says which kernels it launches with which constants; Triton compiles each for the
processors that are asked for; NVIDIA's cuobjdump, which Triton brings along, says what it takes there.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spark.errors import UserError
from spark.model.spark import SparK
from tools.benchmarks.rows import Command, Row, versions

WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}
"""Warps that a multiprocessor holds, by compute capability (CUDA C++ Programming Guide, "Technical Specifications")."""
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228}
"""Shared memory of a multiprocessor [KiB]; a block may have all of it but 1 KiB (likewise)."""
REGISTERS = 65536
"""Registers of a multiprocessor, which are given out to warps by 256."""
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
ALIGNED = [["tt.divisibility", 16]]
"""What Triton assumes of pointers from PyTorch's allocator, and of sizes that 16 divides."""


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is compiled for.

    Attributes:
        kernel: name.
        signature: type of each parameter.
        constants: (name, value) of those that are compiled in.
        aligned: positions of parameters that are multiples of 16.
        options: (name, value), such as num_warps.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Hashable], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def shape(self) -> str:
        """The constants that say what it computes, such as "C 64, O 256, KH 3"."""
        shown = ((name, value) for name, value in self.constants if name.isupper() and isinstance(value, int))
        return ", ".join(f"{name} {value:d}" for name, value in shown)


def launches(
    name: str, batch: int, size: int, mask_ratio: float, precision: torch.dtype
) -> Counter[tuple[Launch, int]]:
    """How often a training step (forward and backward) launches each kernel with so many programs.

    Args:
        name: of the encoder.
        batch: images.
        size: of an image [px].
        mask_ratio: share of patches that are masked.
        precision: of autocast; torch.float32 is without.
    """
    from spark.sparse import sites
    from spark.sparse.kernels import triton_kernels

    found: Counter[tuple[Launch, int]] = Counter()
    model = SparK(name, size, layout="triton", mask_ratio=mask_ratio)
    with ExitStack() as stack:
        for kernel in vars(triton_kernels).values():
            if hasattr(kernel, "run") and hasattr(kernel, "params"):
                recorder = _Recorder(kernel, found)
                stack.enter_context(mock.patch.object(kernel, "run", recorder))
        stack.enter_context(mock.patch.object(triton_kernels, "require_device"))
        stack.enter_context(mock.patch.object(sites, "static_on", return_value=True))
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        copies: dict[str, Tensor] = {
            key: fake.from_tensor(value) for key, value in model.state_dict(keep_vars=True).items()
        }
        if precision != torch.float32:
            stack.enter_context(torch.autocast("cpu", precision))
        images = torch.empty(batch, 3, size, size)
        out = torch.func.functional_call(model, copies, (images,))
        out.loss.backward()
    return found


class _Recorder:
    """Stands in for the launch of a kernel."""

    def __init__(self, kernel: Any, found: Counter[tuple[Launch, int]]):
        self.kernel, self.found = kernel, found

    def __call__(self, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False))
        values |= {key: options.pop(key) for key in list(options) if key in names}
        signature, constants, aligned = [], [], []
        for position, (name, parameter) in enumerate(zip(names, self.kernel.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature.append((name, "constexpr"))
                constants.append((name, value))
                continue
            whole = isinstance(value, int)
            signature.append(
                (name, TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if whole else "fp32")
            )
            if not whole or value % 16 == 0:
                aligned.append(position)
        programs = 1
        for count in grid:
            programs *= count
        launch = Launch(
            self.kernel.__name__, tuple(signature), tuple(constants), tuple(aligned), tuple(options.items())
        )
        self.found[launch, programs] += 1


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared: bytes of a block.
        warps: of a block.
        resident: warps on a multiprocessor at once.
        tensor_cores: whether it multiplies on them.
        asynchronous: whether it loads ahead while it computes.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    resident: int
    tensor_cores: bool
    asynchronous: bool


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile a kernel for a compute capability such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spark.sparse.kernels import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants}
    source = ASTSource(
        kernel, dict(launch.signature), constants, {(position,): ALIGNED for position in launch.aligned}
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, spilled = _usage(binary.asm["cubin"])
    shared, warps, code = binary.metadata.shared, binary.metadata.num_warps, binary.asm["ptx"]
    return Resources(
        registers,
        spilled,
        shared,
        warps,
        resident_warps(capability, registers, shared, warps),
        bool(re.search(r"\b(wgmma\.mma|mma\.sync|tcgen05\.mma)", code)),
        "cp.async" in code,
    )


def resident_warps(capability: int, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that a multiprocessor holds at once.

    Args:
        capability: such as 90.
        registers: of a thread.
        shared: bytes of a block; the system takes 1 KiB more.
        warps: of a block.
    """
    of_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        WARPS[capability] // warps,
        REGISTERS // (of_warp * warps),
        SHARED[capability] * 1024 // (shared + 1024),
    )
    return blocks * warps


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and the bytes that it spills."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [program, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        )
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """A row for each kernel, shape and processor."""
    for name in options.model:
        for text in options.precision:
            precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[text]
            found = launches(name, options.batch, options.size, options.mask_ratio, precision)
            for capability in options.capability:
                yield [
                    _row(options, name, text, capability, launch, programs, count)
                    for (launch, programs), count in sorted(found.items(), key=lambda item: item[0][0].kernel)
                ]


def _row(
    options: argparse.Namespace,
    name: str,
    precision: str,
    capability: int,
    launch: Launch,
    programs: int,
    count: int,
) -> Row:
    found = compiled(launch, capability)
    return {
        "kind": "kernels",
        "model": name,
        "batch": str(options.batch),
        "size": str(options.size),
        "mask_ratio": str(options.mask_ratio),
        "precision": precision,
        "capability": str(capability),
        "contender": launch.kernel.strip("_").removesuffix("_kernel"),
        "shape": launch.shape(),
        "programs": str(programs),
        "launches": str(count),
        "registers": str(found.registers),
        "spilled_bytes": str(found.spilled),
        "shared_bytes": str(found.shared),
        "warps": str(found.warps),
        "resident_warps": str(found.resident),
        "tensor_cores": "yes" if found.tensor_cores else "no",
        "loads_ahead": "yes" if found.asynchronous else "no",
        **versions(),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--model", nargs="+", default=["resnet50", "convnext_tiny"], help="encoders of timm")
    parser.add_argument("--batch", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--size", type=int, default=224, help="of an image [px] (default: 224)")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="default: 0.6")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--capability", nargs="+", type=int, default=[80, 90], choices=list(WARPS), help="default: 80 90"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be compiled here."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError("kernels needs triton: install it, or a build of PyTorch for CUDA") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("kernels compiles for GPUs: take TRITON_INTERPRET out of the environment")


def finish(options: argparse.Namespace, rows: list[Row]) -> None:
    """Say what would keep a kernel from running, or from running well."""
    for row in rows:
        which = f"{row['contender']} ({row['shape']}) of {row['model']} on {row['capability']}"
        if int(row["shared_bytes"]) > SHARED[int(row["capability"])] * 1024 - 1024:
            print(f"{which} cannot run: {row['shared_bytes']} bytes of shared memory are more than there are")
        if int(row["spilled_bytes"]):
            print(f"{which} spills {row['spilled_bytes']} bytes of each thread")


COMMANDS = {
    "kernels": Command(
        "what the Triton kernels of a step take on a GPU, without one",
        add_options,
        measure,
        check,
        finish=finish,
        times=False,
    )
}
