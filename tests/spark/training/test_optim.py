"""Parameter groups, optimizers and schedules against plain restatements of the official rules."""

import math

import pytest
import timm
import torch
from torch import nn

from spark.training.optim import (
    build_optimizer,
    layer_scales,
    lr_at,
    one_cycle_at,
    parameter_groups,
    set_hyperparameters,
    weight_decay_at,
)


class Densify(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.norm = nn.BatchNorm2d(4)
        self.projection = nn.Conv2d(4, 6, 1)


class Tiny(nn.Module):
    """Decayed: the two weights of convolutions and token_mixer.  Not: token, gamma, norms, biases, scalar."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3)
        self.densify = nn.ModuleList([Densify()])
        self.token_mixer = nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.randn(6, 1, 1))
        self.temperature = nn.Parameter(torch.tensor(1.0))


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


# --- groups ---


@pytest.mark.parametrize(
    ("total", "rise", "div", "final"),
    [(50, 0.3, 25.0, 1e4), (50, 0.7, 1.0, 1e4), (7, 0.5, 10.0, 10.0)],
)
def test_one_cycle_is_that_of_torch(total: int, rise: float, div: float, final: float) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total, pct_start=rise, div_factor=div, final_div_factor=final
    )
    for step in range(total):
        group = optimizer.param_groups[0]
        lr = one_cycle_at(
            step, peak=0.02, total_steps=total, rise=rise, start_factor=1 / div, end_factor=1 / div / final
        )
        momentum = one_cycle_at(
            step, peak=0.85, total_steps=total, rise=rise, start_factor=0.95 / 0.85, end_factor=0.95 / 0.85
        )
        assert lr == pytest.approx(group["lr"], rel=1e-9), step
        assert momentum == pytest.approx(group["betas"][0], rel=1e-9), step
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_one_cycle_of_any_length() -> None:
    options = {"peak": 1.0, "rise": 0.3, "start_factor": 0.1, "end_factor": 0.01}
    assert one_cycle_at(0, total_steps=1, **options) == pytest.approx(1.0)
    assert one_cycle_at(0, total_steps=10, **{**options, "rise": 0.0}) == pytest.approx(1.0)
    assert one_cycle_at(99, total_steps=10, **options) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_momentum_is_set_with_the_rates(name: str) -> None:
    optimizer = build_optimizer(name, [{"params": [nn.Parameter(torch.zeros(1))]}], 0.1, (0.9, 0.99), 1e-8)
    set_hyperparameters(optimizer, 0.1, 0.0)
    before = dict(optimizer.param_groups[0])
    set_hyperparameters(optimizer, 0.1, 0.0, 0.87)
    group = optimizer.param_groups[0]
    assert (group.get("betas"), group.get("momentum")) == (
        ((0.87, 0.99), None) if name == "adamw" else (None, 0.87)
    )
    assert "momentum_scheduled" not in before


def test_decay_rule():
    model = Tiny()
    groups = parameter_groups(model, 0.04)
    assert [group["name"] for group in groups] == ["model/no_decay", "model/decay"]
    undecayed, decayed = groups
    assert names_of(model, decayed) == {"encoder.weight", "densify.0.projection.weight", "token_mixer.weight"}
    assert names_of(model, undecayed) == {
        "encoder.bias",
        "densify.0.token",
        "densify.0.norm.weight",
        "densify.0.norm.bias",
        "densify.0.projection.bias",
        "token_mixer.bias",
        "gamma",
        "temperature",
    }
    assert (decayed["weight_decay"], decayed["weight_decay_scale"], decayed["lr_scale"]) == (0.04, 1.0, 1.0)
    assert (undecayed["weight_decay"], undecayed["weight_decay_scale"]) == (0.0, 0.0)


def test_frozen_parameters_are_left_out():
    model = Tiny()
    model.encoder.requires_grad_(False)
    kept = set().union(*(names_of(model, group) for group in parameter_groups(model, 0.1)))
    assert not any(name.startswith("encoder.") for name in kept)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        parameter_groups(model, 0.1)


def test_encoder_factor():
    model = Tiny()
    scale = {
        group["name"]: group["lr_scale"] for group in parameter_groups(model, 0.1, encoder_lr_factor=0.1)
    }
    assert scale == {"encoder/decay": 0.1, "encoder/no_decay": 0.1, "head/no_decay": 1.0, "head/decay": 1.0}


@pytest.mark.parametrize(
    ("name", "official"),
    [
        # layer of a parameter, and the number of layers, in SparK's fine-tuning code
        ("convnext_tiny", {"stem.0.weight": 0, "stages.0.blocks.2.gamma": 1, "stages.2.downsample.1.weight": 3,
                           "stages.2.blocks.8.gamma": 5, "stages.3.blocks.0.gamma": 6, "layers": 6}),
        ("convnext_small", {"stem.0.weight": 0, "stages.1.downsample.1.weight": 2, "stages.2.blocks.26.gamma": 11,
                            "stages.3.downsample.1.weight": 12, "layers": 12}),
        ("resnet50", {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer2.0.conv1.weight": 2,
                      "layer4.2.conv3.weight": 6, "layers": 6}),
    ],
)  # fmt: skip
def test_layer_decay_is_that_of_the_official_fine_tuning(name, official):
    layers = official.pop("layers")
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
    scales = layer_scales(encoder, 0.7)
    assert scales.keys() == dict(encoder.named_parameters()).keys()
    for parameter, layer in official.items():
        assert scales[parameter] == (f"encoder.layer{layer}", pytest.approx(0.7 ** (layers + 1 - layer))), (
            parameter
        )
    assert max(scale for label, scale in scales.values() if label != "encoder.head") == pytest.approx(0.7)
    if "convnext" in name:
        assert scales["head.norm.weight"] == ("encoder.head", 1.0)


def test_layer_decay_in_groups_covers_every_parameter_once():
    model = nn.Sequential()
    model.encoder = timm.create_model("test_convnext", num_classes=0)
    model.head = nn.Conv2d(64, 1, 1)
    groups = parameter_groups(model, 0.05, layer_decay=0.5, encoder_lr_factor=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    scale = {group["name"]: group["lr_scale"] for group in groups}
    assert scale["head/decay"] == 1.0
    assert scale["encoder.layer3/decay"] == pytest.approx(0.05)  # deepest: 0.5 * 0.1
    assert scale["encoder.layer0/no_decay"] == pytest.approx(0.1 * 0.5**4)
    assert scale["encoder.head/no_decay"] == pytest.approx(0.1)


def test_layer_decay_needs_the_order_of_layers():
    model = nn.ModuleDict({"encoder": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="group_matcher"):
        parameter_groups(model, 0.1, layer_decay=0.7)


# --- optimizers ---


def lamb_step(parameters, gradients, moments, step, lr, weight_decay, betas, eps):
    """The official LAMB, parameter by parameter: (value, decayed) pairs in, new values out."""
    beta1, beta2 = betas
    new = []
    for (value, decayed), gradient, (m, v) in zip(parameters, gradients, moments, strict=True):
        m.copy_(beta1 * m + (1 - beta1) * gradient)
        v.copy_(beta2 * v + (1 - beta2) * gradient**2)
        m_hat, v_root = m / (1 - beta1**step), (v / (1 - beta2**step)).sqrt()
        update = m_hat / (v_root + eps)
        if decayed and weight_decay:
            update = update + weight_decay * value
            ratio = value.norm() / update.norm() if value.norm() > 0 and update.norm() > 0 else 1.0
            update = update * ratio
        new.append((value - lr * update, decayed))
    return new


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_lamb_is_the_official_one(betas):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False)).double()
    with torch.no_grad():
        model.get_parameter("2.weight").zero_()  # a weight of norm 0 takes a plain Adam step
    optimizer = build_optimizer("lamb", parameter_groups(model, 0.04), lr=0.01, betas=betas, eps=1e-6)
    values = [(p.detach().clone(), p.ndim > 1) for p in model.parameters()]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value, _ in values]
    total = 6
    for step in range(total):
        lr = lr_at(step, peak=0.01, total_steps=total, warmup_steps=2)
        decay = weight_decay_at(step, start=0.04, end=0.2, total_steps=total)
        gradients = [torch.randn_like(value) for value, _ in values]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        set_hyperparameters(optimizer, lr, decay)
        optimizer.step()
        values = lamb_step(values, gradients, moments, step + 1, lr, decay, betas, 1e-6)
        for parameter, (value, _) in zip(model.parameters(), values, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)


def test_lamb_does_not_clip_gradients_itself():
    model = nn.Linear(3, 3)
    optimizer = build_optimizer("lamb", parameter_groups(model, 0.1), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e4)
    optimizer.step()
    state = optimizer.state[model.bias]
    torch.testing.assert_close(state["exp_avg"], torch.full_like(model.bias, 1e3))


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_other_optimizers(name, kind):
    model = Tiny()
    groups = parameter_groups(model, 0.3, encoder_lr_factor=0.5)
    optimizer = build_optimizer(name, groups, lr=0.2, betas=(0.8, 0.99), eps=1e-7)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["lr"] == 0.2 * group["lr_scale"]
        assert group["weight_decay"] == 0.3 * group["weight_decay_scale"]
        if name == "adamw":
            assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.99), 1e-7)
        else:
            assert (group["momentum"], group["nesterov"]) == (0.8, True)


def test_set_hyperparameters_scales_each_group():
    model = Tiny()
    optimizer = build_optimizer("adamw", parameter_groups(model, 0.1, encoder_lr_factor=0.1), lr=1.0)
    set_hyperparameters(optimizer, 3.0, 0.2)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates["encoder/decay"] == (pytest.approx(0.3), 0.2)
    assert rates["head/no_decay"] == (3.0, 0.0)


# --- schedules ---


def test_schedules_follow_the_official_formulas():
    peak, total, warmup = 0.8, 100, 7
    for step in range(total):
        if step < warmup:
            lr = 0.005 * peak + 0.995 * peak * step / warmup
        else:
            ratio = (step - warmup) / (total - 1 - warmup)
            lr = 0.001 * peak + 0.999 * peak * (0.5 + 0.5 * math.cos(math.pi * ratio))
        decay = 0.2 + (0.04 - 0.2) * (0.5 + 0.5 * math.cos(math.pi * step / (total - 1)))
        assert lr_at(step, peak=peak, total_steps=total, warmup_steps=warmup) == pytest.approx(lr, rel=1e-12)
        assert weight_decay_at(step, start=0.04, end=0.2, total_steps=total) == pytest.approx(
            decay, rel=1e-12
        )


def test_schedule_edges():
    assert lr_at(0, peak=1.0, total_steps=1, warmup_steps=0) == 1.0
    assert lr_at(0, peak=1.0, total_steps=10, warmup_steps=0) == 1.0
    assert lr_at(0, peak=1.0, total_steps=1, warmup_steps=1) == pytest.approx(0.005)
    assert lr_at(9, peak=1.0, total_steps=10, warmup_steps=9) == 1.0
    assert lr_at(9, peak=1.0, total_steps=10, warmup_steps=10) == pytest.approx(0.005 + 0.995 * 0.9)
    assert lr_at(9, peak=1.0, total_steps=10, warmup_steps=2) == pytest.approx(0.001)
    assert lr_at(50, peak=1.0, total_steps=10, warmup_steps=2) == pytest.approx(0.001)
    assert lr_at(3, peak=2.0, total_steps=10, warmup_steps=0, start_factor=0.0, end_factor=1.0) == 2.0
    assert weight_decay_at(0, start=0.04, end=0.2, total_steps=1) == pytest.approx(0.04)
    assert weight_decay_at(9, start=0.04, end=0.2, total_steps=10) == pytest.approx(0.2)
    assert weight_decay_at(50, start=0.04, end=0.2, total_steps=10) == pytest.approx(0.2)


def test_a_cooldown_follows_a_constant_rate():
    rates = [
        lr_at(step, peak=2.0, total_steps=21, warmup_steps=4, cooldown_steps=16, end_factor=0.5)
        for step in range(23)
    ]
    assert rates[4] == 2.0
    for step, left in {5: 1 - 0.25, 8: 1 - 0.5, 13: 1 - 0.75, 20: 0, 22: 0}.items():
        done = step - 4  # of 16 steps: square roots of 1/16, 4/16, 9/16
        assert left == pytest.approx(max(1 - math.sqrt(min(done / 16, 1)), 0))
        assert rates[step] == pytest.approx(2 * (0.5 + 0.5 * left))
    decays = [
        weight_decay_at(step, start=0.04, end=0.2, total_steps=21, cooldown_steps=16) for step in range(23)
    ]
    assert decays[:5] == pytest.approx([0.04] * 5)
    assert decays[8] == pytest.approx(0.12)
    assert decays[20] == decays[22] == pytest.approx(0.2)
    # Without one the run can be left anywhere.
    assert lr_at(20, peak=2.0, total_steps=21, warmup_steps=4, cooldown_steps=0) == 2.0
