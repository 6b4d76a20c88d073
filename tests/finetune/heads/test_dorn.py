"""DORN: bins, polarity and order of channels, decoding, and the loss against a plain restatement."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune import DepthModel
from finetune.heads.dorn import LOGITS, Discretisation, log_odds
from finetune.heads.output import DepthOutput
from finetune.losses.base import NoGroundTruth
from finetune.losses.ordinal import OrdinalRegression
from tests.finetune.heads.test_heads import small

NYU = Discretisation(68, math.exp(-0.36), math.exp(68 / 25 - 0.36))


def test_the_bins_of_the_published_network() -> None:
    labels = torch.arange(68, dtype=torch.float64)
    torch.testing.assert_close(NYU.thresholds(), torch.exp(labels / 25 - 0.36))
    shifted = Discretisation(2, 1.0, 15.0, xi=1.0).edges()  # sqrt(2 * 16) between 2 and 16
    torch.testing.assert_close(shifted, torch.tensor([1.0, math.sqrt(32) - 1, 15.0], dtype=torch.float64))
    model = DepthModel("test_resnet", head="dorn", width=8, fused=8)
    torch.testing.assert_close(
        model.head.bins.edges(), torch.exp(torch.arange(69) / 25.0 - 0.36).double(), rtol=1e-4, atol=0
    )


def test_polarity_and_order_of_the_channels() -> None:
    """Three thresholds, of which channels 1 and 3 say that depth exceeds the first two."""
    logits = torch.tensor([0.0, 5.0, -1.0, 2.0, 3.0, 0.0]).reshape(1, 6, 1, 1)
    assert log_odds(logits).flatten().tolist() == [5.0, 3.0, -3.0]
    head: Any = small("dorn", bins=3, alpha=1.0, beta=8.0, max_depth=8.0).head
    # edges 1, 2, 4, 8: two exceeded thresholds are bin 1, from 2 to 4 m
    assert head.decode(log_odds(logits)).item() == pytest.approx(3.0)
    assert head.decode(torch.full((1, 3, 1, 1), -1.0)).item() == pytest.approx(1.5)  # nearer than all bins
    assert head.decode(torch.full((1, 3, 1, 1), 1.0)).item() == pytest.approx(6.0)


def perfect_odds(depth: torch.Tensor, bins: Discretisation) -> torch.Tensor:
    thresholds = bins.thresholds()[:, None, None]
    return torch.where(depth >= thresholds, 9.0, -9.0)


def test_a_perfect_prediction_is_off_by_half_a_bin_at_most() -> None:
    model = DepthModel("test_resnet", head="dorn", width=8, fused=8)
    head: Any = model.head
    depth = torch.linspace(0.7, 9.999, 5000, dtype=torch.float64).reshape(1, 1, 1, -1)
    decoded = head.decode(perfect_odds(depth, head.bins))
    off = (decoded / depth - 1).abs()
    step = math.exp(1 / 25)
    # The middle of a bin lies (step - 1) / 2 beyond its lower edge, relative to that edge.
    assert off.max() <= (step - 1) / 2 + 1e-4
    assert off.max() == pytest.approx((step - 1) / 2, rel=0.05)
    assert (decoded <= 10).all()


def restated(
    logits: torch.Tensor, depth: torch.Tensor, valid: torch.Tensor, bins: Discretisation
) -> torch.Tensor:
    """Equations 2 and 3, pixel by pixel, with a softmax of each pair of channels."""
    terms = []
    for image, row, column in valid[:, 0].nonzero().tolist():
        label = int((depth[image, 0, row, column] >= bins.thresholds()).sum()) - 1
        for k in range(bins.bins):
            nearer, exceeded = logits[image, 2 * k : 2 * k + 2, row, column].softmax(0)
            terms.append(-(exceeded if k <= label else nearer).log())
    return torch.stack(terms).sum() / valid.sum()


def test_the_loss_is_its_restatement_with_gradients() -> None:
    torch.manual_seed(0)
    bins = Discretisation(5, 0.5, 8.0, xi=0.25)
    logits = torch.randn(2, 10, 3, 4, dtype=torch.float64, requires_grad=True)
    depth = 0.3 + 8 * torch.rand(
        2, 1, 3, 4, dtype=torch.float64
    )  # some nearer and some farther than all bins
    valid = torch.rand(2, 1, 3, 4) > 0.3
    model: Any = SimpleNamespace(
        head=SimpleNamespace(bins=bins, outputs=("depth",), extras={LOGITS: 10}, counted=("depth",)),
        to_frame=lambda values, size: values,
    )
    loss = OrdinalRegression()
    loss.attach(model)
    batch = {"depth": depth.masked_fill(~valid, math.nan), "valid": valid}
    value = loss(DepthOutput(extras={LOGITS: logits}), batch, model)
    expected = restated(logits, depth, valid, bins)
    torch.testing.assert_close(value, expected)
    (one,), (other,) = torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(one, other)
    assert (one[~valid.expand_as(one)] == 0).all()
    with pytest.raises(NoGroundTruth, match="OrdinalRegression needs a pixel"):
        loss(DepthOutput(extras={LOGITS: logits}), {**batch, "valid": torch.zeros_like(valid)}, model)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(DepthOutput(extras={LOGITS: logits.bfloat16()}), batch, model).dtype == torch.float32


def test_the_model_brings_logits_to_the_image() -> None:
    """Of images that need padding: the loss compares each pixel with the logits above it."""
    model = small("dorn").train()
    loss = OrdinalRegression()
    loss.attach(model)
    output = model(torch.randn(2, 3, 40, 70))
    assert output.extras[LOGITS].shape == (2, 24, 2, 3)
    depth = torch.full((2, 1, 40, 70), 3.0)
    odds = loss.prediction(output, {"depth": depth}, model)
    assert odds.shape == (2, 12, 40, 70)
    assert torch.equal(output.depth, model.head.decode(odds))
    assert not output.depth.requires_grad
    loss(output, {"depth": depth, "valid": depth > 0}, model).backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_a_dilated_resnet_gives_logits_at_stride_8() -> None:
    model = DepthModel(
        "resnet18", head="dorn", encoder_options={"output_stride": 8}, bins=4, width=8, fused=8
    ).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).extras[LOGITS].shape == (1, 8, 8, 8)
