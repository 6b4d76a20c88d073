"""Losses beyond pointwise ones against oracles and hand-computed cases, on ground truth with holes and without any."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.nn import functional as F

from finetune import DepthModel
from finetune.heads.output import DepthOutput
from finetune.least_squares import scale_and_shift_of_images
from finetune.losses import LOSSES
from finetune.losses.affine import GradientMatching, ScaleShiftInvariant
from finetune.losses.base import DepthLoss, NoGroundTruth
from finetune.losses.ranking import PairwiseRanking
from finetune.losses.structure import SSIM, Smoothness
from finetune.losses.weighted import WeightedLoss
from tests.finetune.heads.test_heads import small
from tests.finetune.losses.given import PLAIN, SegmentationOfLogits, of


def random_maps(
    batch: int = 2, height: int = 16, width: int = 20
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, height, width)
    prediction = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    target = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return prediction, target, torch.rand(shape, generator=generator) > 0.3


def random_case(name: str) -> tuple[DepthLoss, torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """A loss, a prediction, its targets with holes, and which values of the prediction have a ground truth."""
    prediction, target, valid = random_maps()
    generator = torch.Generator().manual_seed(1)
    if name == "ranking":
        points = torch.stack(
            [torch.randint(0, side, (2, 5), generator=generator) for side in (16, 20, 16, 20)], -1
        )
        relation = torch.randint(-1, 2, (2, 5), generator=generator)
        pairs_valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        known = torch.zeros_like(valid)
        for image, pairs in enumerate(points.tolist()):
            for number, (row_a, column_a, row_b, column_b) in enumerate(pairs):
                if pairs_valid[image, number]:
                    known[image, 0, row_a, column_a] = known[image, 0, row_b, column_b] = True
        return PairwiseRanking(), prediction, (points, relation, pairs_valid), known
    if name == "segmentation":
        logits = torch.randn(2, 13, 16, 20, generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, 13, (2, 16, 20), generator=generator) % 256  # -1 becomes void
        return SegmentationOfLogits(), logits, (labels,), (labels < 255)[:, None].expand_as(logits)
    if name == "ssim":
        valid = torch.ones_like(valid)
        valid[0, 0, 0, 0] = valid[1, 0, 15, 3] = False
        return SSIM(unit_depth=2.0), prediction, (target, valid), valid
    return LOSSES[name](), prediction, (target, valid), valid


STRUCTURED = ["ssi", "gradient", "ranking", "ssim", "segmentation"]


@pytest.mark.parametrize("name", STRUCTURED)
def test_what_has_no_ground_truth_changes_nothing_and_gets_zero_gradient(name: str) -> None:
    loss, prediction, targets, known = random_case(name)
    plain = of(loss, prediction, *targets)
    assert plain > 0
    spoilt = prediction.masked_fill(~known, math.nan).requires_grad_()
    if name in ("ssi", "gradient", "ssim"):
        targets = (targets[0].masked_fill(~known, math.nan), targets[1])
    value = of(loss, spoilt, *targets)
    value.backward()
    torch.testing.assert_close(value, plain)
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert (spoilt.grad[~known] == 0).all()
    assert (spoilt.grad[known] != 0).any()


@pytest.mark.parametrize("name", STRUCTURED)
def test_nan_stays_nan(name: str) -> None:
    loss, prediction, targets, known = random_case(name)
    where = known.nonzero()[len(known.nonzero()) // 2]
    prediction[tuple(where)] = math.nan
    assert of(loss, prediction, *targets).isnan()


@pytest.mark.parametrize("name", STRUCTURED)
def test_nothing_to_compare_with_is_an_error_not_a_perfect_score(name: str) -> None:
    loss, prediction, targets, _ = random_case(name)
    empty = {
        "ranking": lambda: (*targets[:2], torch.zeros_like(targets[2])),
        "segmentation": lambda: (torch.full_like(targets[0], 255),),
    }.get(name, lambda: (targets[0], torch.zeros_like(targets[1])))()
    with pytest.raises(NoGroundTruth, match="needs"):
        of(loss, prediction, *empty)


@pytest.mark.parametrize("name", [*STRUCTURED, "smoothness"])
def test_losses_are_fp32_inside_autocast(name: str) -> None:
    if name == "smoothness":
        loss, prediction, targets = Smoothness(), random_maps()[0], (torch.rand(2, 3, 16, 20),)
    else:
        loss, prediction, targets, _ = random_case(name)
    low = prediction.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = of(loss, low, *targets)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, of(loss, low.float(), *targets), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ssi", "gradient", "ranking"])
def test_gradients_in_fp64(name: str) -> None:
    loss, prediction, targets, _ = random_case(name)
    assert torch.autograd.gradcheck(lambda x: of(loss, x, *targets), prediction.requires_grad_())


def test_alignment_is_the_least_squares_solution_of_each_image() -> None:
    prediction, target, valid = random_maps()
    scale, shift = scale_and_shift_of_images(prediction.float(), target.float(), valid)
    for image in range(2):
        p, t = (maps[image][valid[image]].float().double().numpy() for maps in (prediction, target))
        solution = np.linalg.lstsq(np.stack((p, np.ones_like(p)), 1), t, rcond=None)[0]
        np.testing.assert_allclose([scale[image].item(), shift[image].item()], solution, rtol=1e-9)


def test_alignment_far_from_the_origin_keeps_its_digits() -> None:
    prediction, target, valid = random_maps()
    scale, _ = scale_and_shift_of_images(prediction, target, valid)
    far, _ = scale_and_shift_of_images(1e6 + prediction, target, valid)
    torch.testing.assert_close(far, scale, rtol=1e-6, atol=0)


def test_ssi_is_the_formula_of_midas_and_knows_neither_scale_nor_shift() -> None:
    prediction, target, valid = random_maps()
    squares, pixels = 0.0, 0
    for image in range(2):
        p, t = (maps[image][valid[image]].numpy() for maps in (prediction, target))
        matrix = np.stack((p, np.ones_like(p)), 1)
        squares += ((matrix @ np.linalg.lstsq(matrix, t, rcond=None)[0] - t) ** 2).sum()
        pixels += len(p)
    loss = ScaleShiftInvariant()
    assert of(loss, prediction, target, valid).item() == pytest.approx(squares / (2 * pixels), rel=1e-9)
    factors = torch.tensor([3.0, 0.1]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        of(loss, factors * prediction + 7, target, valid), of(loss, prediction, target, valid)
    )
    assert of(loss, 2 * target - 1, target, valid).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("loss", [ScaleShiftInvariant(), GradientMatching()], ids=str)
def test_a_constant_prediction_has_a_finite_loss_and_gradient(loss: DepthLoss) -> None:
    _, target, valid = random_maps()
    prediction = torch.full_like(target, 0.7).requires_grad_()
    value = of(loss, prediction, target, valid)
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_images_with_two_readings_are_left_out() -> None:
    prediction, target, valid = random_maps()
    loss = ScaleShiftInvariant()
    alone = of(loss, prediction[:1], target[:1], valid[:1])
    valid[1] = False
    valid[1, 0, 3, 3:5] = True
    torch.testing.assert_close(of(loss, prediction, target, valid), alone)


def test_gradient_matching_by_hand() -> None:
    # The residual of a prediction that explains nothing of the target is the target about its mean: here +-1/2 ...
    target = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)[None, None]
    prediction = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)[None, None]
    valid = torch.ones_like(target, dtype=torch.bool)
    # ... so 6 horizontal and 4 vertical steps of 1 over 8 pixels; at the second scale 0, 0: no step.
    assert of(GradientMatching(scales=1), prediction, target, valid).item() == pytest.approx(10 / 8)
    assert of(GradientMatching(scales=2), prediction, target, valid).item() == pytest.approx(10 / 8)
    # A hole takes two horizontal steps and a vertical one with it; 7 pixels are left, the fit is another.
    valid[..., 0, 1] = False
    scale, shift = (float(value) for value in scale_and_shift_of_images(prediction, target, valid))
    residual = (scale * prediction + shift - target)[0, 0]
    steps = [abs(residual[0, 2] - residual[0, 3])]
    steps += [abs(residual[1, i + 1] - residual[1, i]) for i in range(3)]
    steps += [abs(residual[1, i] - residual[0, i]) for i in (0, 2, 3)]
    expected = float(torch.stack(steps).sum()) / 7
    assert of(GradientMatching(scales=1), prediction, target, valid).item() == pytest.approx(expected)


def pair_case(relation: int) -> tuple[torch.Tensor, ...]:
    """Depth 5 m at point A (row 1, column 2), 3 m at B (row 0, column 1)."""
    prediction = torch.ones(1, 1, 3, 4, dtype=torch.float64)
    prediction[0, 0, 1, 2], prediction[0, 0, 0, 1] = 5.0, 3.0
    points = torch.tensor([[[1, 2, 0, 1], [0] * 4]])
    return prediction, points, torch.tensor([[relation, 0]]), torch.tensor([[True, False]])


@pytest.mark.parametrize(
    ("relation", "expected"),
    [(1, math.log(1 + math.exp(-2))), (-1, math.log(1 + math.exp(2))), (0, 4.0)],
)
def test_ranking_by_hand_with_its_polarity(relation: int, expected: float) -> None:
    assert of(PairwiseRanking(), *pair_case(relation)).item() == pytest.approx(expected)
    assert of(PairwiseRanking(polarity="nearer"), *pair_case(-relation)).item() == pytest.approx(expected)
    prediction, *targets = pair_case(relation)
    by_disparity = PairwiseRanking(output="disparity_affine")
    assert by_disparity.predicts == "disparity_affine"
    assert of(by_disparity, -prediction, *targets).item() == pytest.approx(expected)


def test_ranking_learns_the_order() -> None:
    prediction, *targets = pair_case(-1)  # A is the nearer one, and is predicted farther
    prediction.requires_grad_()
    of(PairwiseRanking(), prediction, *targets).backward()
    assert prediction.grad is not None
    assert prediction.grad[0, 0, 1, 2] > 0  # descent brings A nearer
    assert prediction.grad[0, 0, 0, 1] < 0


def test_ranking_without_its_smallest_losses() -> None:
    prediction = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 5)
    points = torch.tensor([[[0, 0, 0, i] for i in range(1, 5)]])
    losses = F.softplus(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    relation = torch.ones(1, 4, dtype=torch.int64)
    loss = of(PairwiseRanking(drop_smallest=0.25), prediction, points, relation, relation > 0)
    torch.testing.assert_close(loss, losses[1:].mean())


def test_ranking_refuses_points_outside_and_unknown_relations() -> None:
    prediction, points, relation, valid = pair_case(1)
    for outside in (4, -1):
        with pytest.raises(ValueError, match="outside the image of 3x4"):
            of(PairwiseRanking(), prediction, points.masked_fill(points == 2, outside), relation, valid)
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        of(PairwiseRanking(), prediction, points, relation + 1, valid)


def test_ssim_is_that_of_scikit_image() -> None:
    prediction, target, _ = random_maps(1)
    valid = torch.ones_like(target, dtype=torch.bool)
    _, similarity = structural_similarity(
        prediction[0, 0].numpy() / 10,
        target[0, 0].numpy() / 10,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        full=True,
    )
    inside = similarity[5:-5, 5:-5]  # whole windows of 11
    assert of(SSIM(), prediction, target, valid).item() == pytest.approx((1 - inside.mean()) / 2, rel=1e-6)


def test_ssim_counts_whole_windows_only() -> None:
    prediction, target, _ = random_maps(1)
    valid = torch.ones_like(target, dtype=torch.bool)
    valid[..., :4, :] = False
    torch.testing.assert_close(
        of(SSIM(), prediction, target, valid),
        of(SSIM(), prediction[..., 4:, :], target[..., 4:, :], valid[..., 4:, :]),
    )


def test_smoothness_by_hand() -> None:
    disparity = torch.tensor([[1.0, 2.0], [1.0, 4.0]]).reshape(1, 1, 2, 2)
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 1] = 0.3
    # across: 1 at an edge of 0.3, and 3; down: 0, and 2 at the edge; each axis a mean of two
    edge = math.exp(-0.3)
    plain = (edge + 3) / 2 + (0 + 2 * edge) / 2
    assert of(Smoothness(normalise=False), disparity, image).item() == pytest.approx(plain)
    assert of(Smoothness(), disparity, image).item() == pytest.approx(plain / 2)  # the mean disparity is 2
    torch.testing.assert_close(of(Smoothness(), 5 * disparity, image), of(Smoothness(), disparity, image))


def test_dice_and_focal_by_their_formulas_without_void() -> None:
    generator = torch.Generator().manual_seed(2)
    loss = SegmentationOfLogits(classes=3, dice=0.4)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator)
    keep = torch.rand(2, 4, 5, generator=generator) > 0.3
    labels[~keep] = 255
    scores = logits.permute(0, 2, 3, 1)[keep]
    truth = F.one_hot(labels[keep], 3).double()
    probability = scores.softmax(1)
    dice = 1 - 2 * (probability * truth).sum(0) / (probability.sum(0) + truth.sum(0))
    p = torch.where(truth > 0, scores.sigmoid(), 1 - scores.sigmoid())
    focal = (-((1 - p) ** 2) * p.log()).mean()
    expected = 0.4 * dice.mean() + 0.6 * focal
    torch.testing.assert_close(of(loss, logits, labels), expected)


def test_labels_out_of_range_are_refused() -> None:
    loss = SegmentationOfLogits(classes=3)
    logits = torch.zeros(1, 3, 2, 2)
    for bad in (3, -1):
        with pytest.raises(ValueError, match="3 classes, 0 to 2, beside void, 255"):
            of(loss, logits, torch.full((1, 2, 2), bad))


def test_disparity_follows_from_depth_where_no_other_is_given() -> None:
    depth = torch.tensor([[2.0, 0.0], [4.0, 5.0]]).reshape(2, 1, 1, 2)
    valid = depth > 0
    loss = ScaleShiftInvariant()
    target, known = loss.targets({"depth": depth, "valid": valid}, PLAIN)
    torch.testing.assert_close(target[known], torch.tensor([0.5, 0.25, 0.2]))
    assert torch.equal(known, valid)
    given = {"affine": depth, "affine_valid": valid}
    assert loss.targets(given, PLAIN) == (depth, valid)


def test_terms_without_ground_truth_add_exactly_nothing() -> None:
    prediction, target, valid = random_maps()
    prediction.requires_grad_()
    batch = {"depth": target, "valid": valid, "labels": torch.full((2, 16, 20), 255)}
    logits = torch.full((2, 13, 16, 20), math.nan, requires_grad=True)
    output = DepthOutput(prediction, extras={"segmentation": logits})
    losses = WeightedLoss({"l1": 1.0, "ranking": 1.0})
    losses.losses["segmentation"] = SegmentationOfLogits()
    losses.losses["segmentation"].own = torch.nn.Linear(2, 2)
    losses.weights["segmentation"] = 0.1
    total, parts = losses(output, batch, PLAIN)
    assert list(parts) == ["l1"]
    torch.testing.assert_close(total, parts["l1"], rtol=0, atol=0)
    total.backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    for parameter in losses.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()
    with pytest.raises(NoGroundTruth, match=r"L1 needs.*Segmentation.* needs"):
        losses(output, {**batch, "valid": torch.zeros_like(valid)}, PLAIN)


def test_nothing_is_zero_whatever_the_output() -> None:
    prediction = torch.tensor([math.nan, math.inf]).requires_grad_()
    zero = WeightedLoss({"l1": 1.0}).nothing(DepthOutput(prediction[None, None, None] * 2))
    zero.backward()
    assert zero.item() == 0
    assert prediction.grad is not None
    assert (prediction.grad == 0).all()


def test_smoothness_sees_colours_not_normalised_images() -> None:
    generator = torch.Generator().manual_seed(3)
    prediction, colours = (
        1 + torch.rand(1, 1, 8, 8, generator=generator),
        torch.rand(1, 3, 8, 8, generator=generator),
    )
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    image = (colours - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    model = DepthModel("test_resnet", decoder_channels=(16, 8, 8, 8, 8), mean=mean, std=std)
    total, _ = WeightedLoss({"smoothness": 1.0})(DepthOutput(prediction), {"image": image}, model)
    torch.testing.assert_close(total, of(Smoothness(), 1 / prediction, colours))


def test_what_model_or_data_lack_is_told_before_training() -> None:
    metric, relative, counting = small("unetpp"), small("fusion"), small("dorn")
    losses = WeightedLoss({"silog": 1.0, "ssi": 1.0, "smoothness": 1.0})
    losses.attach(metric)
    losses.check({"image", "depth", "valid"})
    with pytest.raises(ValueError, match=r"'silog' scores depth, and the head gives disparity_affine"):
        WeightedLoss({"silog": 1.0}).attach(relative)
    with pytest.raises(ValueError, match=r"or rank what it gives \(loss_options\.ranking\.output\)"):
        WeightedLoss({"ranking": 1.0}).attach(relative)
    with pytest.raises(ValueError, match=r"'ordinal' scores ordinal_logits, and the head gives depth"):
        WeightedLoss({"ordinal": 1.0}).attach(metric)
    for name in ("silog", "ssi"):
        with pytest.raises(
            ValueError, match=rf"'{name}' scores depth, which head dorn counts.*ordinal_logits"
        ):
            WeightedLoss({name: 1.0}).attach(counting)
    with pytest.raises(ValueError, match=r"'ranking' needs pairs and relation and pairs_valid of the data"):
        WeightedLoss({"ranking": 1.0}).check({"image", "depth", "valid"})
    with pytest.raises(ValueError, match=r"'silog' scores depth, which the model does not give"):
        WeightedLoss({"silog": 1.0})(
            DepthOutput(), {"depth": torch.ones(1, 1, 2, 2), "valid": torch.ones(1, 1, 2, 2) > 0}, PLAIN
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gradient", {"scales": 0}, "at least 1"),
        ("ranking", {"polarity": "closer"}, "farther or nearer"),
        ("ranking", {"output": "disparity"}, "disparity_affine"),
        ("ranking", {"drop_smallest": 1.0}, "below 1"),
        ("ssim", {"unit_depth": 0.0}, "positive"),
        ("ssim", {"window": 4}, "odd"),
        ("mse", {"unit_depth": -1.0}, "positive"),
        ("segmentation", {"dice": 1.5}, r"\[0, 1\]"),
        ("segmentation", {"classes": 0}, "at least 1"),
    ],
)
def test_wrong_options_say_what_to_do(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedLoss({name: 1.0}, {name: options})
