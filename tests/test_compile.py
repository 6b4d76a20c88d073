"""torch.compile of a masked forward: one graph, and the loss and gradients of the plain one."""

import pytest
import torch
from torch import _dynamo

from spark.masking import random_visible
from spark.model import SparK


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_a_step_is_one_graph(name, layout):
    """`fullgraph` refuses any graph break; `aot_eager` traces the backward pass too, without generating code."""
    torch.manual_seed(0)
    model = SparK(name, 64, decoder_width=32, layout=layout).train().double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    visible = random_visible(4, model.grid, 0.6)
    count = int(visible.sum())
    loss = model(images, visible, count).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    _dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images, visible, count).loss
    assert compiled.item() == pytest.approx(loss.item(), rel=1e-12)
    compiled.backward()
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-9, atol=1e-12, msg=key)
    _dynamo.reset()
