"""What only a CUDA device can show: the same numbers there, mixed precision, no waiting, the memory sentence."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from spark import pretrain
from spark.model.masking import random_visible
from spark.model.spark import SparK
from spark.training.log import read_rows
from tests.spark.model.test_model import lively
from tests.spark.test_pretrain import small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder with 12 noisy images."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (80, 96, 3)).astype(np.uint8)).save(
            folder / f"{number:02d}.png"
        )
    return folder


def step_of(model, images, visible):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(images, visible).loss
    loss.backward()
    return loss.item(), {k: p.grad.cpu().clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("name", ["resnet26", "convnext_atto"])
def test_fp64_equals_the_cpu(name, layout):
    torch.manual_seed(0)
    model = lively(SparK(name, (64, 96), layout=layout, decoder_width=64)).double()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    visible = random_visible(3, (2, 3), 0.6, generator=torch.Generator().manual_seed(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss, grads = step_of(model, images, visible)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(before)
    cuda_loss, cuda_grads = step_of(model.cuda(), images.cuda(), visible.cuda())
    assert cuda_loss == pytest.approx(loss, rel=1e-9)
    largest = max(g.abs().max() for g in grads.values())
    for key, grad in grads.items():
        assert (cuda_grads[key] - grad).abs().max() <= 1e-7 * grad.abs().max() + 1e-11 * largest, key
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.cpu(), after[key], rtol=1e-9, atol=1e-12, msg=key)


ENCODERS = ["resnet26", "convnext_atto", "seresnext26d_32x4d", "resnet50_gn"]
"""With batch norm, layer norm and depthwise convolutions, squeeze and excitation, group norm."""
NORMS = {"resnet50_gn": "ln"}  # of densify, where the encoder's own kind is neither


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ENCODERS)
def test_layouts_agree_under_autocast(name, memory_format, precision):
    losses = {}
    for layout in ("masked", "packed", "triton"):
        torch.manual_seed(0)
        model = (
            lively(SparK(name, 64, layout=layout, decoder_width=64, densify_norm=NORMS.get(name)))
            .cuda()
            .to(memory_format=memory_format)
        )
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)).cuda()
        images = images.contiguous(memory_format=memory_format)
        visible = random_visible(4, (2, 2), 0.5, generator=torch.Generator().manual_seed(1)).cuda()
        with torch.autocast("cuda", precision):
            out = model(images, visible)
        out.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        losses[layout] = out.loss.item()
    assert losses["packed"] == pytest.approx(losses["masked"], rel=2e-2)
    assert losses["triton"] == pytest.approx(losses["masked"], rel=2e-2)


@pytest.fixture
def waiting_is_an_error():
    """A function: from here on, CUDA refuses whatever would make the host wait for it."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["masked", "packed", "triton"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_waits_for_nothing(name, layout, precision, waiting_is_an_error):
    torch.manual_seed(0)
    options = {"decoder_width": 64, "drop_path": 0.1, "densify_norm": NORMS.get(name)}
    model = lively(SparK(name, (64, 96), layout=layout, **options)).cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step(*inputs):
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = model(*inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = []
    for number in range(4):
        if number == 2:  # by then kernels are compiled, algorithms chosen, and the optimizer's state is made
            torch.cuda.synchronize()
            waiting_is_an_error()
        images = torch.randn(4, 3, 64, 96).pin_memory()
        visible = random_visible(4, (2, 3), 0.6).pin_memory()
        count = int(visible.sum())
        moved = images.cuda(non_blocking=True), visible.cuda(non_blocking=True)
        losses.append(step(*moved, count))
        losses.append(step(moved[0]))  # the model draws a mask
    if layout != "masked":
        with pytest.raises(RuntimeError, match="synchronizing"):  # the count is missed
            model(*moved)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("name", ["resnet26", "convnext_atto"])
def test_a_captured_step_replays_with_other_images_and_masks(name):
    torch.manual_seed(0)
    model = lively(SparK(name, (64, 96), layout="packed", decoder_width=64)).double().cuda()
    eager = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64, device="cuda")
    visible = random_visible(3, (2, 3), 0.6, device="cuda")
    count = int(visible.sum())

    def step():
        out = model(images, visible, count)
        out.loss.backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    model.load_state_dict(before)  # in place: the warm-up has moved the running statistics
    # Only the count is fixed: images may differ in how many of its patches they show.
    uneven = (torch.rand(18, generator=torch.Generator().manual_seed(5)).argsort() < count).view(3, 1, 2, 3)
    assert len(uneven.flatten(1).sum(1).unique()) > 1
    for mask in (random_visible(3, (2, 3), 0.6), uneven):
        images.copy_(torch.randn(3, 3, 64, 96, dtype=torch.float64))
        visible.copy_(mask)
        graph.replay()
        eager.zero_grad()
        expected = eager(images, mask.cuda())
        expected.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(out.prediction, expected.prediction, rtol=1e-7, atol=1e-9)
        grads = {k: p.grad for k, p in eager.named_parameters() if p.grad is not None}
        largest = max(g.abs().max() for g in grads.values())
        for key, grad in grads.items():
            error = (model.get_parameter(key).grad - grad).abs().max()
            assert error <= 1e-7 * grad.abs().max() + 1e-11 * largest, key
        for (key, value), other in zip(model.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=key)


WRONG_COUNT = """
import torch
from spark.sparse import sparsify
visible = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="cuda")
sparsify(torch.zeros(1, 3, 64, 64, device="cuda"), visible, visible_count=3)
torch.cuda.synchronize()
"""


def test_a_wrong_count_fails_an_assertion_of_the_device():
    """In a process of its own, for the device is of no use to that process afterwards."""
    process = subprocess.run(
        [sys.executable, "-c", WRONG_COUNT], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert process.returncode != 0
    assert "device-side assert" in process.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_resumes_where_it_stopped(photos, tmp_path, precision):
    options = [f"--precision={precision}", "--data.workers=0"]
    pretrain.main(small_run(photos, tmp_path / "whole", *options))
    AcceleratorState._reset_state(reset_partial_state=True)
    part = [*options, "--checkpoint_every=4", "--keep_checkpoints=2"]
    pretrain.main(small_run(photos, tmp_path / "part", *part))
    AcceleratorState._reset_state(reset_partial_state=True)
    start = tmp_path / "part" / "checkpoints" / "step_0000004"
    pretrain.main(small_run(photos, tmp_path / "part", *options, f"--resume={start}"))
    whole, resumed = read_rows(tmp_path / "whole/metrics.jsonl"), read_rows(tmp_path / "part/metrics.jsonl")
    assert [row["step"] for row in resumed] == list(range(1, 9))
    for a, b in zip(whole, resumed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if precision == "fp32" else 3e-2)


def test_out_of_memory_says_what_to_do(photos, tmp_path, capsys):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 400e6) / total)
    try:
        big = ["--model.name=resnet50", "--model.input_size=512", "--model.decoder_width=768"]
        with pytest.raises(SystemExit):
            pretrain.main(small_run(photos, tmp_path / "run", *big))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "too little memory" in capsys.readouterr().err
