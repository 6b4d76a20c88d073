"""torch.compile of a training step: the loss and gradients of the plain one, for nearly all encoders as one graph."""

import pytest
import torch
from torch import _dynamo

from spark.model.masking import random_visible
from spark.model.spark import SparK
from tests.spark.sparse.test_sparse import ENCODERS, LAYOUTS, encoder_of

QUICK = ["test_convnext", "test_resnet", "fasternet_t0"]
BREAKS = ["inception_next_atto", "mambaout_femto", "fasternet_t0"]
"""They call `torch.cat` on a tuple, which Dynamo does not hand to a sparse value."""


def slow_but(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def require_equal_to_plain(name, layout, fullgraph):
    """`aot_eager` traces the backward pass too, without generating code."""
    encoder = encoder_of(name)
    model = SparK(encoder, 64, decoder_width=32, layout=layout).train().double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    visible = random_visible(4, model.grid, 0.6)
    count = int(visible.sum())
    loss = model(images, visible, count).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    largest = max(grad.abs().max().item() for grad in plain.values())

    _dynamo.reset()
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(images, visible, count).loss
        assert compiled.item() == pytest.approx(loss.item(), rel=1e-12)
        compiled.backward()
    finally:
        _dynamo.reset()
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        torch.testing.assert_close(
            parameter.grad, plain[key], rtol=1e-9, atol=1e-12 * max(1, largest), msg=key
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", slow_but(name for name in ENCODERS if name not in BREAKS))
def test_a_step_is_one_graph(name, layout):
    """`fullgraph` refuses any graph break."""
    require_equal_to_plain(name, layout, fullgraph=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", slow_but(BREAKS))
def test_a_graph_with_breaks_computes_the_same(name, layout):
    with pytest.raises(_dynamo.exc.Unsupported):
        require_equal_to_plain(name, layout, fullgraph=True)
    require_equal_to_plain(name, layout, fullgraph=False)
