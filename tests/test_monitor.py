"""spark.monitor: reconstruction panels."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark.masking import random_visible
from spark.model import SparK
from spark.monitor import reconstruction_panels, save_panels

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
    assert picture.size == (3 * width + 4 * 2, 2 * height + 3 * 2 + 16)

    pixels = np.asarray(picture)[16:]
    seen = visible[0, 0].repeat_interleave(32, 0).repeat_interleave(32, 1)
    seen = seen.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    shown = colours[0, :3] if channels >= 3 else colours[0, :1].expand(3, -1, -1)
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
