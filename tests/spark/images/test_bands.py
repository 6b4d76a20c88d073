"""spark.images.bands: images of any number of channels, in arrays, `.npy` files and multi-band TIFF."""

import io

import numpy as np
import pytest
import tifffile
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn import functional

from spark.images.bands import open_image
from spark.images.batches import collate_images
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.sources import open_source
from spark.images.transform import PretrainTransform
from spark.model.normalise import Normalise
from spark.model.spark import SparK
from spark.monitor.panels import reconstruction_panels
from spark.weights.encoder import load_encoder
from tests.spark.test_pretrain import curve, error_of, run, small_run

FIVE = (0.5,) * 5
KINDS = [np.uint8, np.uint16, np.float32]


def values_of(kind, *shape):
    random = np.random.default_rng(0)
    if kind == np.float32:
        return random.normal(300, 100, shape).astype(np.float32)
    return random.integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_pixels(kind):
    values = values_of(kind, 12, 10, 5)
    apart = values.transpose(2, 0, 1)
    big = values.astype(values.dtype.newbyteorder(">"))
    forms = [values, npy(values), npy(big), tiff(values, planarconfig="contig", photometric="minisblack")]
    forms += [
        tiff(apart, planarconfig="separate", photometric="minisblack"),
        tiff(apart),
        tiff(apart, bigtiff=True),
    ]
    forms += [tiff(apart, compression="zlib", photometric="minisblack")]
    for form in forms:
        picture = open_image(form, 5)
        assert (picture.height, picture.width) == (12, 10)
        assert np.array_equal(picture.pixels(), values)
    assert open_image(npy(values[..., 0]), 1).pixels().shape[:2] == (12, 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy(np.zeros((4, 4, 3), np.uint8)),
            r"it has 3 channels \(the last of \[4, 4, 3\]\), and model\.in_chans is 5",
        ),
        (
            npy(np.zeros((5, 4, 4, 2), np.uint8)),
            r"it holds \[5, 4, 4, 2\], and an image is \[H, W\] or \[H, W, C\]",
        ),
        (npy(np.zeros((4, 4, 5), np.int32)), r"it holds int32, not uint8, uint16, float32; convert it"),
        (npy(np.zeros((40, 40, 5), np.uint8)), r"40 x 40 pixels are more than max_pixels = 1000"),
        (tiff(np.zeros((5, 40, 40), np.uint8)), r"40 x 40 pixels are more than max_pixels = 1000"),
        (
            tiff(np.zeros((2, 5, 4, 4), np.uint8), metadata={"axes": "TCYX"}),
            r"its axes are TCYX \[2, 5, 4, 4\]",
        ),
        (
            b"\x89PNG",
            r"neither a NumPy file \(\.npy\) nor TIFF, which images of model\.in_chans 5 are read from",
        ),
        (npy(np.zeros((9, 9, 5), np.uint8))[:-9], r"cannot reshape|EOF|bytes"),
    ],
)
def test_what_is_no_such_image(content, message):
    with pytest.raises(Exception, match=message):
        open_image(content, 5, max_pixels=1000)


def test_objects_are_not_unpickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        open_image(buffer.getvalue(), 5)


@pytest.mark.parametrize("kind", KINDS)
def test_crop_flip_and_scale(kind):
    """Against PyTorch's own resampling in double precision, of values on the scale that mean and std are given in."""
    values = values_of(kind, 40, 48, 5)
    if kind == np.uint8:
        values = (
            values // 2 + 60
        )  # PyTorch's filter for bytes cuts off between its two passes what leaves 0..255
    white = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    exact = torch.from_numpy(values.astype(np.float64) / white).permute(2, 0, 1)[None]
    expected = functional.interpolate(exact, (24, 32), mode="bicubic", antialias=True)[0]
    if kind != np.float32:
        expected = expected.clamp(0, 1)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.6, 0.7, 0.8, 0.9)
    for flip in (0, 1):
        transform = PretrainTransform((24, 32), 5, (1, 1), mean, std, hflip=flip)
        transform._aspects = [48 / 40] * 2  # the crop is the whole image
        image = transform(open_image(values, 5))
        assert image.dtype == (torch.uint8 if kind == np.uint8 else torch.float32)
        wanted = (expected.flip(2) if flip else expected) - torch.tensor(mean)[:, None, None]
        wanted = wanted / torch.tensor(std)[:, None, None]
        batch = image[None].clone()
        found = Normalise(mean, std, fused=True)(batch)[0].double()
        assert (found - wanted).abs().max() < {np.uint8: 0.01, np.uint16: 1e-5, np.float32: 1e-3}[kind]
        assert torch.equal(batch[0], image), "what was handed over is left as it is"


def test_numbers_that_are_not_finite_are_unreadable(tmp_path):
    values = values_of(np.float32, 3, 20, 20, 5)
    values[1, 4, 4, 2] = np.nan
    np.save(tmp_path / "a.npy", values)
    images = UnlabeledImages(
        open_source(str(tmp_path / "a.npy"), "unused")[0],
        SampleReader(PretrainTransform(32, 5, (1, 1), FIVE, FIVE), seed=0, channels=5),
    )
    assert images[0, 1]["failed"] == [f"{tmp_path}/a.npy[1]: it holds numbers that are not finite"]


def test_mixed_scales_are_refused():
    samples = [
        {"image": torch.zeros(5, 4, 4, dtype=kind), "position": 0, "index": 0, "name": name, "failed": []}
        for kind, name in ((torch.uint8, "a"), (torch.float32, "b"))
    ]
    with pytest.raises(
        ValueError, match="images of 8 bits and of more were mixed, such as a and b: convert them"
    ):
        collate_images(samples)


def test_folders_patterns_and_lists_of_arrays(tmp_path):
    for number in range(3):
        (tmp_path / "d").mkdir(exist_ok=True)
        np.save(tmp_path / "d" / f"{number}.npy", np.full((8, 9, 5), number, np.uint16))
    (tmp_path / "list.txt").write_text("d\n")
    for text in (tmp_path, tmp_path / "d" / "*.npy", tmp_path / "list.txt"):
        source = open_source(str(text), "unused")[0]
        assert [open_image(source.read(n), 5).pixels()[0, 0, 0] for n in range(3)] == [0, 1, 2]
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "photo.png")
    assert len(open_source(str(tmp_path), "unused")[0]) == 1, "beside photographs, arrays are something else"


@pytest.mark.parametrize(
    ("channels", "mean", "lines"), [(3, 0.5, 1), (5, 0.5, 2), (2, 0.5, 2), (1, 300.0, 2)]
)
def test_panels_say_what_they_show(channels, mean, lines):
    torch.manual_seed(0)
    model = SparK("test_resnet", input_size=64, in_chans=channels, decoder_width=32)
    images = torch.randn(2, channels, 64, 64)
    visible = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    visible[:, :, 0] = True
    picture = reconstruction_panels(model, images, visible, (mean,) * channels, (0.2,) * channels)
    assert picture.height == 2 * (128 + 2) + 2 + 16 * lines
    if lines == 2:
        shown = np.asarray(picture)[34 : 34 + 128 : 2, 2 : 2 + 128 : 2].astype(float) / 255
        wanted = (
            (images[0, :3] / 6 + 0.5).clamp(0, 1) if channels >= 3 else (images[0, :1] / 6 + 0.5).clamp(0, 1)
        )
        wanted = wanted.expand(3, -1, -1)
        assert np.abs(shown - wanted.permute(1, 2, 0).numpy()).max() < 0.005


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("kind", "form"), list(zip(KINDS, ["memmap", "files", "tiff"], strict=True)))
def test_five_channels_train_resume_and_leave_what_every_run_leaves(tmp_path, form, kind):
    values = values_of(kind, 12, 70, 80, 5)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        if form == "files":
            np.save(images / f"{number}.npy", values[number])
        elif form == "tiff":
            tifffile.imwrite(
                images / f"{number}.tif", values[number].transpose(2, 0, 1), photometric="minisblack"
            )
    if form == "memmap":
        np.save(tmp_path / "images.npy", values)
        images = tmp_path / "images.npy"
    mean = {np.uint8: 0.5, np.uint16: 0.5, np.float32: 300.0}[kind]
    std = {np.uint8: 0.3, np.uint16: 0.3, np.float32: 100.0}[kind]
    options = ["--model.in_chans=5", f"--data.mean={[mean] * 5}", f"--data.std={[std] * 5}", "--max_steps=3"]
    options += [
        "--checkpoint_every=1",
        "--panels_every=3",
        "--model.train_sizes=[64,[32,64]]",
        "--monitor.every=3",
    ]
    options += ["--monitor.max_share=1", "--monitor.max_images=4", "--keep_checkpoints=3"]
    run(small_run(images, tmp_path / "run", *options))
    rows = curve(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0.5 < row["loss"] < 2 for row in rows), "patches are normalised by themselves"
    assert rows[-1]["rank"] >= 1
    assert Image.open(tmp_path / "run" / "figures" / "panels_0000003.png").height == 6 * 130 + 2 + 32
    encoder = load_encoder(tmp_path / "run" / "encoder")
    assert encoder.pretrained_cfg["mean"] == pytest.approx((mean,) * 5)
    assert next(encoder.parameters()).shape[1] == 5
    half = tmp_path / "run" / "checkpoints" / "step_0000001"
    run(small_run(images, tmp_path / "again", *options, f"--resume={half}"))
    assert [row["loss"] for row in curve(tmp_path / "again")] == [row["loss"] for row in rows[1:]]


def test_channels_that_do_not_fit_are_sentences_and_write_nothing(tmp_path, capsys):
    np.save(tmp_path / "a.npy", values_of(np.uint8, 4, 70, 80, 4))
    full = ["--model.in_chans=5", "--data.mean=[0.5,0.5,0.5,0.5,0.5]", "--data.std=[1,1,1,1,1]"]
    for options, words in [
        (full[:1], "model.in_chans is 5: give data.mean and data.std, 5 numbers each"),
        (full[:2], "--data.std [0.5,0.5,0.5,0.5,0.5]"),
        ([*full[:2], "--data.std=[1,1]"], "std has 2 values for 5 channels: give one a channel"),
        (full, "a.npy[0]: it has 4 channels (the last of [70, 80, 4]), and model.in_chans is 5"),
        (
            ["--model.in_chans=3"],
            "a.npy[0]: it has 4 channels (the last of [70, 80, 4]), and model.in_chans is 3",
        ),
    ]:
        assert words in error_of(capsys, small_run(tmp_path / "a.npy", tmp_path / "run", *options))
        assert not (tmp_path / "run").exists()
    Image.new("RGB", (80, 80)).save(tmp_path / "photo.png")
    (tmp_path / "list.txt").write_text("photo.png\n")
    error = error_of(capsys, small_run(tmp_path / "list.txt", tmp_path / "run", *full))
    assert "photo.png: it is neither a NumPy file (.npy) nor TIFF" in error
