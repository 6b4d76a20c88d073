"""`tools.benchmark kernels`: what a step launches, counted by its modules, and what the compiled kernels take."""

import json
import subprocess
import sys

import pytest
from torch import nn

from spark import SparK
from tools.benchmarks import kernels

SCRIPT = """
import json, torch
from tools.benchmarks.kernels import compiled, launches
found = launches("test_resnet", 4, 64, 0.6, torch.bfloat16)
count, taken = {}, {}
for (launch, _), times in found.items():
    count[launch.kernel] = count.get(launch.kernel, 0) + times
    if launch.kernel not in taken:
        taken[launch.kernel] = vars(compiled(launch, 90))
print(json.dumps([count, taken]))
"""


def test_kernels_are_compiled_for_a_gpu_that_is_not_there():
    """In a process of its own: in this one, the kernels may be those of Triton's interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, taken = (
        {name.strip("_").removesuffix("_kernel"): value for name, value in one.items()}
        for one in json.loads(done.stdout)
    )
    for name, resources in taken.items():
        assert resources["spilled"] == 0
        assert 0 < resources["registers"] <= 255
        assert resources["tensor_cores"] == (name in ("convolution", "weight_gradient"))
    model = SparK("test_resnet", 64)
    slid = sum(
        isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.stride == (1, 1)
        for m in model.encoder.modules()
    )
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.encoder.modules()) + len(model.densify)
    # A convolution runs forward and, for the gradient of its input, backward.
    assert (count["convolution"], count["weight_gradient"]) == (2 * slid, slid)
    assert count["statistics"] == count["merge_statistics"] == norms
    assert count["normalise_backward"] == count["normalise_sums"] == norms


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [
        (32, 0, 4, 64),  # as many as there can be
        (96, 256, 4, 20),  # 65536 / (96 * 128) = 5.3 blocks
        (100, 0, 4, 16),  # 100 * 32 registers of a warp are given out as 3328: 4.9 blocks
        (32, 66048, 8, 24),  # 228 KiB / (64.5 + 1) KiB = 3.5 blocks
    ],
)
def test_warps_on_a_multiprocessor(registers, shared, warps, resident):
    assert kernels.resident_warps(90, registers, shared, warps) == resident
