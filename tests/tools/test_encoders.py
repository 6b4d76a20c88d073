"""The table of encoders: its checks fail where a rule is wrong, and it reports what it saw."""

import csv
import re

import pytest
import timm
import torch
import torch.nn.functional as F

from spark.model.encoder import build_encoder
from spark.sparse import MASKED, PACKED
from tests.spark.test_own_encoders import my_nets  # noqa: F401  (a fixture)
from tools import encoders
from tools.encoders import PROPERTIES, TABLE, Trial, families, rows_of, try_family


def test_a_family_that_is_supported():
    trial = try_family("resnet", "test_resnet")
    assert trial.held == PROPERTIES
    assert trial == Trial("resnet", "test_resnet", 372_688, (2, 4, 8, 16, 32), 32, PROPERTIES, "")


def test_a_network_that_halves_once_more_inside_needs_larger_patches(monkeypatch):
    monkeypatch.setattr(encoders, "CHECKS", {"zero": encoders.check_zero})
    trial = try_family("own", "ghostnetv2_100")  # gates computed at twice the last stride
    assert (trial.patch_size, trial.strides[-1], trial.refusal) == (64, 32, "")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("edgenext_xx_small", r"no sparse rule for reshape .*'reshape' in module 'stages.1.blocks.1'"),
        ("legacy_xception", r"does not line up .*'conv2d' in module 'conv1' \(Conv2d\)"),
        ("vit_tiny_patch16_224", "yields no feature pyramid"),
        ("swin_tiny_patch4_window7_224", "doesn't match model"),
    ],
)
def test_a_refusal_names_operator_and_module(name, sentence):
    trial = try_family("any", name)
    assert "packed" not in trial.held
    assert re.search(sentence, trial.refusal), trial.refusal


def relu_that_leaks(func, x, *args, **kwargs):
    data = x.data.relu()
    return x.like(data + 1e-6 * torch.nan_to_num(data).mean())


@pytest.mark.parametrize(
    ("layout", "operator", "rule", "lost"),
    [
        (PACKED, "relu_", lambda func, x: x.like(x.data.abs()), {"dense", "packed"}),
        (PACKED, "relu_", lambda func, x: x.like(x.data.relu().detach()), {"dense", "packed"}),
        (MASKED, "relu_", relu_that_leaks, {"dense", "zero", "packed"}),
    ],
)
def test_a_wrong_rule_is_seen(monkeypatch, layout, operator, rule, lost):
    """Another function, no gradient, something in masked sites."""
    monkeypatch.setitem(layout.rules, operator, rule)
    monkeypatch.setitem(layout.rules, operator.rstrip("_"), rule)
    trial = try_family("resnet", "test_resnet")
    assert trial.refusal
    assert lost <= set(PROPERTIES) - set(trial.held)


def test_the_table_holds_what_was_seen(monkeypatch, tmp_path, capsys):
    table = tmp_path / "encoders.csv"
    table.write_text("family,member\nresnet,test_resnet\nvit,vit_tiny_patch16_224\n")
    monkeypatch.setattr(encoders, "TABLE", table)
    monkeypatch.setattr(encoders, "families", lambda: families(table))
    encoders.main(["--write"])
    assert "1 of 2 are supported" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    assert [(r["family"], r["supported"], r["packed"], r["patch_size"]) for r in rows] == [
        ("resnet", "yes", "yes", "32"),
        ("vit", "no", "no", "0"),
    ]
    page = (tmp_path / "encoders.md").read_text()
    assert "| resnet | `test_resnet` | 0.4 M | 2, 4, 8, 16, 32 | 32 |" in page
    assert "| vit | `vit_tiny_patch16_224` | none | VisionTransformer yields no feature pyramid" in page
    assert "`convnext`" in page  # among the modules of which none was tried


def test_members_are_timm_models():
    members = families()
    assert len(members) == len(set(members.values())) >= 100
    assert [name for name in members.values() if not timm.is_model(name)] == []


def test_a_row_of_the_committed_table_comes_out_again():
    rows = csv.DictReader(TABLE.open(encoding="utf-8"))
    (committed,) = (row for row in rows if row["family"] == "mobilenetv3")
    (row,) = rows_of([try_family("mobilenetv3", committed["member"])])
    versions = ("timm", "torch")
    assert {k: str(v) for k, v in row.items() if k not in versions} == {
        k: v for k, v in committed.items() if k not in versions
    }


def test_no_drop_path_means_none():
    encoder = build_encoder("focalnet_tiny_srf")  # timm's own rate is 0.1
    images = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        a, b = (encoder.forward_features(images) for _ in range(2))
    assert F.l1_loss(a, b) == 0


def test_the_properties_of_an_own_encoder(my_nets, capsys):  # noqa: F811
    encoders.main(["--models", "my_nets:TinyNet"])
    assert "supported" in capsys.readouterr().out.splitlines()[0]
