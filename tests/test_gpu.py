"""What only a CUDA device can show: the same numbers there, mixed precision, the memory sentence."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from spark import pretrain
from spark.masking import random_visible
from spark.model import SparK
from spark.run import read_rows
from tests.test_model import lively
from tests.test_pretrain import small_run

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


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet26", "convnext_atto"])
def test_layouts_agree_under_autocast(name, memory_format, precision):
    losses = {}
    for layout in ("masked", "packed"):
        torch.manual_seed(0)
        model = (
            lively(SparK(name, 64, layout=layout, decoder_width=64)).cuda().to(memory_format=memory_format)
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
