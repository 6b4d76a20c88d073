"""spark.monitor.measures: features of unmasked images with known answers, their cost, and reconstruction panels."""

import errno
import math
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from spark.model.masking import random_visible
from spark.model.spark import SparK
from spark.monitor.measures import (
    Monitor,
    MonitoredImages,
    channel_std,
    collapse_warning,
    rank_me,
    read_labelled,
)
from spark.monitor.panels import reconstruction_panels, save_panels
from spark.monitor.probes import list_labelled

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("channels", "size"), [(3, (64, 64)), (1, (64, 96)), (4, (64, 64))])
def test_panels(tmp_path, channels, size):
    torch.manual_seed(0)
    model = SparK("test_resnet", size, in_chans=channels, decoder_width=32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mean, std = [0.5] * channels, [0.25] * channels
    colours = torch.rand(2, channels, *size)
    visible = random_visible(2, model.grid, 0.6)
    picture = reconstruction_panels(model, (colours - 0.5) / 0.25, visible, mean, std)

    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed while drawing"
    zoom = 128 // size[1]
    height, width = size[0] * zoom, size[1] * zoom
    header = 16 if channels in (1, 3) else 32  # with a line that says which channels are shown, and how
    assert picture.size == (3 * width + 4 * 2, 2 * height + 3 * 2 + header)

    pixels = np.asarray(picture)[header:]
    seen = visible[0, 0].repeat_interleave(32, 0).repeat_interleave(32, 1)
    seen = seen.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    shown = colours[0, :3] if channels >= 3 else colours[0, :1].expand(3, -1, -1)
    if channels == 4:
        shown = ((shown - 0.5) / 0.25 / 6 + 0.5).clamp(0, 1)
    truth = (shown * 255).permute(1, 2, 0).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    given, masked, restored = (pixels[2 : 2 + height, 2 + i * (width + 2) :][:, :width] for i in range(3))
    assert np.abs(given - truth).max() <= 1
    assert np.abs(masked[seen] - truth[seen]).max() <= 1
    assert np.abs(masked[~seen] - 127.5).max() <= 1, "masked patches show the mean colour"
    assert np.abs(restored[seen] - truth[seen]).max() <= 1
    assert np.abs(restored[~seen] - truth[~seen]).max() > 1

    path = save_panels(picture, tmp_path, 120)
    assert path == tmp_path / "figures" / "panels_0000120.png"
    assert Image.open(path).size == picture.size


def test_panels_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"the disk is full, .*panels_0000001\.png was not written"):
        save_panels(Image.new("RGB", (4, 4)), tmp_path, 1)
    assert list((tmp_path / "figures").iterdir()) == []


def test_large_images_are_not_enlarged():
    model = SparK("test_resnet", 160, decoder_width=32).eval()
    picture = reconstruction_panels(
        model, torch.zeros(1, 3, 160, 160), random_visible(1, model.grid, 0.6), MEAN, STD
    )
    assert picture.width == 3 * 160 + 4 * 2
    assert not model.training


# --- features of unmasked images


def test_rank_me_of_known_spectra():
    """r equal singular values have rank r; one dominates: near 1; the definition by numpy otherwise."""
    q = torch.linalg.qr(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).double())[0]
    assert rank_me(3 * q) == pytest.approx(20, rel=1e-4)
    assert rank_me(q[:, :5] @ torch.linalg.qr(torch.randn(5, 5).double())[0]) == pytest.approx(5, rel=1e-4)
    assert rank_me(torch.ones(50, 20)) == pytest.approx(1, abs=1e-4)
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert rank_me(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert math.isnan(rank_me(torch.full((3, 2), math.nan)))


def test_channel_std_is_one_for_spread_features_and_zero_for_equal_ones():
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    assert channel_std(x) == pytest.approx(1, abs=0.02)
    assert channel_std(torch.rand(1, 64).expand(100, -1)) == pytest.approx(0, abs=1e-6)
    assert channel_std(7 * x) == pytest.approx(channel_std(x)), "the length of features does not matter"


@pytest.fixture
def labelled(tmp_path):
    """Two classes, dark and bright, 6 training and 4 validation images each, one training image damaged."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name, low in (("bright", 150), ("dark", 10)):
            for number in range(count):
                path = tmp_path / "labelled" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(low, low + 60, (40, 48, 3)).astype(np.uint8)).save(path)
    (tmp_path / "labelled" / "train" / "dark" / "5.png").write_bytes(b"no image")
    return tmp_path / "labelled"


def watch(labelled, most=100):
    return read_labelled(list_labelled(labelled), most, (32, 64), MEAN, STD)


def test_labelled_images_are_read_in_even_shares(labelled):
    whole = watch(labelled)
    assert whole.images.shape == (19, 3, 32, 64)
    assert (int(whole.train.sum()), whole.labels.tolist().count(1)) == (11, 9)
    assert len(whole.unreadable) == 1
    assert "5.png: " in whole.unreadable[0]
    few = watch(labelled, 4)
    assert few.labels.tolist() == [0, 0, 1, 1] * 2
    assert few.train.tolist() == [True] * 4 + [False] * 4


def test_a_measurement_scores_features_and_changes_nothing(labelled):
    torch.manual_seed(0)
    encoder = timm.create_model("test_resnet", num_classes=0).train()
    encoder.layer1.eval()  # a frozen part of one's own keeps its mode
    modes = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    monitor = Monitor(lambda: watch(labelled), 20, 1.0, batch_size=7)
    first = monitor.measure(encoder)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in encoder.modules()] == modes
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in encoder.parameters())

    assert first["knn"] == first["linear"] == 1.0
    with torch.no_grad():
        features = encoder.eval().forward_features(watch(labelled).images).mean((2, 3))
    assert first["rank"] == pytest.approx(rank_me(features), rel=1e-4)
    assert first["channel_std"] == pytest.approx(channel_std(features), rel=1e-4)
    assert "bn_drift" not in first

    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 0.5 * (module.running_var + 1e-5).sqrt()
    assert monitor.measure(encoder)["bn_drift"] == pytest.approx(0.5, rel=1e-3)


def test_running_statistics_of_these_very_images_have_no_gap():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64)
    encoder = timm.create_model("test_resnet", num_classes=0)
    measured = Monitor(lambda: MonitoredImages(images), 16, 1.0, batch_size=16)
    far = measured.measure(encoder)["bn_gap"]
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a cumulative average: one batch sets the statistics
    with torch.no_grad():
        encoder.train()(images)
    assert far > 0.05
    assert measured.measure(encoder)["bn_gap"] < 0.02
    assert "bn_gap" not in Monitor(lambda: MonitoredImages(images), 16, 1.0, 16).measure(
        timm.create_model("test_convnext", num_classes=0)
    ), "no batch norm"


def test_measurements_keep_within_their_share(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def read():
        clock[0] += 6.0  # what the first measurement costs
        return MonitoredImages(torch.randn(4, 3, 32, 32))

    monitor = Monitor(read, 300, 0.03, batch_size=4)
    clock[0] = 99.0
    assert not monitor.affordable(images_per_second=100.0), "300 images in 3 s, of 99 s"
    clock[0] = 101.0
    assert monitor.affordable(images_per_second=100.0)
    values = monitor.measure(timm.create_model("test_resnet", num_classes=0))
    assert values["monitor_seconds"] == pytest.approx(6.0)
    assert values["monitor_share"] == pytest.approx(6 / 107)
    clock[0] = 399.0
    assert not monitor.affordable(100.0), "6 s spent and 6 s expected are 3 % of 400 s"
    clock[0] = 401.0
    assert monitor.affordable(100.0)
    assert Monitor(read, 10**9, 1.0, batch_size=4).affordable(1.0), "a share of 1 is no limit"


def test_collapsed_features_are_warned_of():
    encoder = timm.create_model("test_resnet", num_classes=0)
    values = Monitor(lambda: MonitoredImages(torch.randn(8, 3, 32, 32)), 8, 1.0, 8).measure(encoder)
    assert collapse_warning(values, 8, 1.01, 0.0) is None
    flat = Monitor(lambda: MonitoredImages(torch.ones(8, 3, 32, 32)), 8, 1.0, 8).measure(encoder)
    warning = collapse_warning(flat, 8, 2.0, 0.01)
    assert warning is not None
    assert "rank 1 is below 2 and channel_std" in warning
    assert collapse_warning(flat, 7, 2.0, 0.01) is None, "too few to tell"
    assert collapse_warning({"rank": math.nan, "channel_std": 1.0}, 8, 2.0, 0.01) is not None
