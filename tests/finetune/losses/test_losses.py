"""Depth losses against values worked out by hand, their gradients, and the batches on which they must not lie."""

import math

import pytest
import torch

from finetune.heads.output import DepthOutput
from finetune.losses import LOSSES
from finetune.losses.base import DepthLoss, NoGroundTruth
from finetune.losses.masked import MaskedLoss
from finetune.losses.pointwise import L1, MSE, BerHu
from finetune.losses.silog import SILog
from finetune.losses.weighted import WeightedLoss
from tests.finetune.losses.given import PLAIN, of

POINTWISE = [name for name, kind in LOSSES.items() if issubclass(kind, MaskedLoss)]


def maps(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).reshape(1, 1, 1, -1)


def everywhere(like: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(like, dtype=torch.bool)


def random_pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction = 0.5 + 5 * torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    target = 0.5 + 5 * torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, 1, 3, 4, generator=generator) > 0.3
    return prediction.to(dtype), target.to(dtype), valid


def test_l1_and_mse_by_hand() -> None:
    prediction, target = maps(1.0, 2.0, 5.0), maps(2.0, 2.0, 2.0)
    valid = everywhere(target)
    assert of(L1(), prediction, target, valid).item() == pytest.approx(4 / 3)
    assert of(MSE(), prediction, target, valid).item() == pytest.approx(10 / 3)
    valid[..., 2] = False
    assert of(L1(), prediction, target, valid).item() == pytest.approx(1 / 2)


def test_mse_of_normalised_depth_by_hand() -> None:
    prediction, target = maps(1.0, 2.0, 5.0), maps(2.0, 2.0, 2.0)
    # On depths divided by 10 m: (0.01 + 0 + 0.09) / 3.
    assert of(MSE(unit_depth=10), prediction, target, everywhere(target)).item() == pytest.approx(0.1 / 3)


@pytest.mark.parametrize("options", [{}, {"unbiased": False, "eps": 0}])
def test_silog_is_finite_for_every_finite_prediction(options: dict) -> None:
    prediction = maps(-5.0, 0.0, 1e-30, 1e-4, 3.0, 1e30, dtype=torch.float32).requires_grad_()
    loss = of(SILog(**options), prediction, torch.full_like(prediction, 2.0), everywhere(prediction))
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert (prediction.grad[..., 3:] != 0).all()


def test_berhu_by_hand() -> None:
    # Errors 0.2, 1, 5: c = 0.2 * 5 = 1, so 0.2 and 1 are linear and 5 costs (25 + 1) / 2 = 13.
    prediction, target = maps(1.2, 3.0, 7.0), maps(1.0, 2.0, 2.0)
    assert of(BerHu(), prediction, target, everywhere(target)).item() == pytest.approx((0.2 + 1 + 13) / 3)


def test_berhu_gradient_holds_the_threshold_fixed() -> None:
    prediction, target = maps(1.2, 3.0, 7.0).requires_grad_(), maps(1.0, 4.0, 2.0)
    of(BerHu(), prediction, target, everywhere(target)).backward()
    # c = 1; errors +0.2, -1, +5: slopes 1, -1 and e / c = 5, each over 3 pixels.
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, maps(1 / 3, -1 / 3, 5 / 3))


def test_silog_by_hand_in_both_named_forms() -> None:
    # g = 0, 2: mean 1, biased variance 1, unbiased variance 2.
    target = maps(1.0, 1.0)
    prediction = maps(1.0, math.exp(2))
    valid = everywhere(target)
    zoedepth = SILog(eps=0)
    bts = SILog(unbiased=False, eps=0)
    assert of(zoedepth, prediction, target, valid).item() == pytest.approx(10 * math.sqrt(2 + 0.15))
    assert of(bts, prediction, target, valid).item() == pytest.approx(10 * math.sqrt(1 + 0.15))


def test_silog_bts_form_is_the_formula_of_the_paper() -> None:
    prediction, target, valid = random_pair()
    g = prediction[valid].log() - target[valid].log()
    expected = 10 * (g.square().mean() - 0.85 * g.mean().square()).sqrt()
    torch.testing.assert_close(of(SILog(unbiased=False, eps=0), prediction, target, valid), expected)


def test_silog_zoedepth_form_equals_bts_within_rounding_on_an_image() -> None:
    generator = torch.Generator().manual_seed(1)
    target = 1 + torch.rand(1, 1, 100, 100, generator=generator)
    prediction = target * (1 + 0.1 * torch.randn(1, 1, 100, 100, generator=generator))
    valid = everywhere(target)
    assert of(SILog(), prediction, target, valid).item() == pytest.approx(
        of(SILog(unbiased=False, eps=0), prediction, target, valid).item(), rel=1e-4
    )


def test_silog_variance_focus_one_ignores_a_common_scale() -> None:
    prediction, target, valid = random_pair()
    loss = SILog(variance_focus=1.0, eps=0)
    torch.testing.assert_close(of(loss, 3 * prediction, target, valid), of(loss, prediction, target, valid))


def test_silog_at_a_perfect_prediction_has_a_finite_gradient() -> None:
    prediction = maps(1.0, 2.0, 3.0).requires_grad_()
    loss = of(SILog(), prediction, prediction.detach().clone(), everywhere(prediction))
    loss.backward()
    assert loss.item() == pytest.approx(1e-5)
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_berhu_at_a_perfect_prediction_has_a_finite_gradient() -> None:
    prediction = maps(1.0, 2.0, 3.0).requires_grad_()
    loss = of(BerHu(), prediction, prediction.detach().clone(), everywhere(prediction))
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("loss", [SILog(), SILog(unbiased=False, eps=0), L1(), MSE()], ids=str)
def test_gradients_in_fp64(loss: DepthLoss) -> None:
    prediction, target, valid = random_pair()
    assert torch.autograd.gradcheck(lambda x: of(loss, x, target, valid), prediction.requires_grad_())


@pytest.mark.parametrize("name", POINTWISE)
def test_invalid_pixels_change_nothing_and_get_zero_gradient(name: str) -> None:
    prediction, target, valid = random_pair()
    loss = LOSSES[name]()
    plain = of(loss, prediction, target, valid)
    spoilt_target = target.masked_fill(~valid, math.nan)
    spoilt = prediction.masked_fill(~valid, -1e30).requires_grad_()
    value = of(loss, spoilt, spoilt_target, valid)
    value.backward()
    torch.testing.assert_close(value, plain)
    assert spoilt.grad is not None
    assert (spoilt.grad[~valid] == 0).all()
    assert (spoilt.grad[valid] != 0).any()


@pytest.mark.parametrize("name", POINTWISE)
def test_nan_stays_nan(name: str) -> None:
    prediction, target, valid = random_pair()
    prediction[valid.nonzero(as_tuple=True)] = torch.where(
        torch.arange(int(valid.sum())) == 3, math.nan, prediction[valid]
    )
    assert of(LOSSES[name](), prediction, target, valid).isnan()


@pytest.mark.parametrize("name", POINTWISE)
def test_no_valid_pixel_is_an_error_not_a_perfect_score(name: str) -> None:
    prediction, target, valid = random_pair()
    with pytest.raises(NoGroundTruth, match="ground truth"):
        of(LOSSES[name](), prediction, target, torch.zeros_like(valid))


def test_silog_of_one_pixel_is_an_error() -> None:
    prediction, target = maps(1.0, 2.0), maps(1.0, 3.0)
    with pytest.raises(NoGroundTruth, match="at least 2"):
        of(SILog(), prediction, target, torch.tensor([True, False]).reshape(1, 1, 1, 2))


@pytest.mark.parametrize("name", POINTWISE)
def test_losses_are_fp32_inside_autocast(name: str) -> None:
    prediction, target, valid = random_pair(torch.float32)
    loss = LOSSES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = of(loss, prediction, target, valid)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, of(loss, prediction, target, valid), rtol=0, atol=0)
    low = of(loss, prediction.bfloat16(), target, valid)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, of(loss, prediction.bfloat16().float(), target, valid), rtol=0, atol=0)


def test_shapes_and_mask_type_are_checked() -> None:
    prediction, target, valid = random_pair()
    with pytest.raises(ValueError, match="must have one shape"):
        of(L1(), prediction[..., :-1], target, valid)
    with pytest.raises(ValueError, match="bool"):
        of(L1(), prediction, target, valid.float())


def test_weighted_sum_and_its_parts() -> None:
    prediction, target, valid = random_pair()
    total, parts = WeightedLoss({"silog": 1.0, "l1": 0.5}, {"silog": {"variance_focus": 0.5}})(
        DepthOutput(prediction), {"depth": target, "valid": valid}, PLAIN
    )
    silog = of(SILog(variance_focus=0.5), prediction, target, valid)
    l1 = of(L1(), prediction, target, valid)
    torch.testing.assert_close(total, silog + 0.5 * l1)
    assert list(parts) == ["silog", "l1"]
    torch.testing.assert_close(parts["l1"], l1)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, {}, "no loss is named"),
        ({"silogg": 1.0}, {}, "did you mean 'silog'"),
        ({"silog": 0.0}, {}, "must be positive"),
        ({"silog": 1.0}, {"l1": {}}, "not among"),
        ({"silog": 1.0}, {"silog": {"variance_fokus": 1.0}}, "did you mean 'variance_focus'"),
        ({"silog": 1.0}, {"silog": {"variance_focus": 2.0}}, r"lie in \[0, 1\]"),
        ({"berhu": 1.0}, {"berhu": {"fraction": 0.0}}, "fraction"),
    ],
)
def test_bad_configuration_says_what_to_do(weights: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedLoss(weights, options)
