"""spark.images.decode, spark.images, spark.sources.files: which files, odd and broken ones, augmentation, samples."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from torchvision import transforms

from spark.errors import FileError
from spark.images import dataset as images
from spark.images.batches import collate_images
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.decode import JpegPicture, RawPicture, UnreadableImageError, open_picture, read_image
from spark.images.sources import FileSource, list_images, open_source
from spark.images.transform import PretrainTransform
from spark.model.normalise import Normalise
from spark.seeds import derive_seed
from spark.training.skipped import UnreadableImages


def noise(height=24, width=32, channels=3, seed=0) -> np.ndarray:
    """Random uint8 pixels, [H, W, C] or, for 0 channels, [H, W]."""
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(image: Image.Image) -> RawPicture:
    return RawPicture(np.asarray(image))


def folder_of(path: Path, transform, seed=0) -> UnlabeledImages:
    return UnlabeledImages(FileSource(list_images(path)), SampleReader(transform, seed))


def write_image(path: Path, seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed=seed)).save(path)
    return path


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(path: Path, **options) -> np.ndarray:
    image = read_image(path, **options)
    assert image.mode == "RGB"
    as_the_loader_reads = open_picture(path.read_bytes(), **options)
    assert (as_the_loader_reads.width, as_the_loader_reads.height) == image.size
    assert np.array_equal(as_the_loader_reads.pixels(), image)
    return np.asarray(image)


def huge_png(width=60_000, height=60_000) -> bytes:
    """A valid PNG header that promises 3.6 gigapixels, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------
# Which files
# ----------------------------------------------------------------------------------------------------


def test_folder_is_searched_recursively(tmp_path):
    names = ["flat.jpg", "train/cat/1.JPEG", "train/cat/2.png", "val/dog/deep/er/3.Tif", "b.ppm", "c.PGM"]
    names += ["d.webp", "e.tiff", "f.bmp", "g.jpg"]
    skipped = [
        ".hidden.jpg",
        ".cache/x.jpg",
        "._resource.png",
        "notes.txt",
        "jpg",
        "labels.csv",
        "a.jpg.part",
    ]
    for name in names + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()

    found = list_images(tmp_path)
    assert found == sorted(tmp_path / name for name in names)
    assert list_images(str(tmp_path)) == found


def test_hidden_root_is_allowed(tmp_path):
    image = write_image(tmp_path / ".cache" / "a.png")
    assert list_images(image.parent) == [image]


def test_links_are_followed_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_image(data / "a" / "1.png")
    write_image(elsewhere / "2.png")
    (data / "a" / "parent").symlink_to(data, target_is_directory=True)
    (data / "a" / "self").symlink_to(data / "a", target_is_directory=True)
    (data / "linked").symlink_to(elsewhere, target_is_directory=True)
    (data / "linked_again").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(data, target_is_directory=True)
    (data / "3.png").symlink_to(elsewhere / "2.png")

    assert list_images(data) == [data / "3.png", data / "a" / "1.png", data / "linked" / "2.png"]


def test_missing_source(tmp_path):
    with pytest.raises(FileError, match=r"no image folder, list.*nowhere.*check the path"):
        list_images(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no image in .*looked for \.jpg .*found no file at all"):
        list_images(tmp_path)


def test_folder_without_images_says_what_is_there(tmp_path):
    for name in ["a.npy", "b.npy", "sub/c.NPY", "README", "x.heic"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"found 3 \.npy, ") as error:
        list_images(tmp_path)
    assert "1 .heic" in str(error.value)
    assert "1 without extension" in str(error.value)


def test_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    write_image(tmp_path / "good" / "1.png")
    write_image(tmp_path / "locked" / "2.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(
        os, "scandir", refuse
    )  # permissions do not bind the administrator, who may run this test
    with pytest.raises(OSError, match=r"locked cannot be read \(Permission denied\): correct"):
        list_images(tmp_path)


def test_list_is_relative_to_its_folder(tmp_path, monkeypatch):
    first, second = (
        write_image(tmp_path / "lists" / "in" / "a b.png"),
        write_image(tmp_path / "other" / "b.png"),
    )
    odd = write_image(tmp_path / "c.png").rename(tmp_path / "no_extension")
    text = f"\ufeff# comment\r\n\r\n  ../other/b.png \r\nin/a b.png\n{odd}\n../other/b.png\n"
    (tmp_path / "lists" / "train.txt").write_bytes(text.encode())
    monkeypatch.chdir(tmp_path)

    found = list_images("lists/train.txt")
    assert [path.resolve() for path in found] == [second, first, odd, second]


@pytest.mark.parametrize("entry", ["../b.png", "in/../../b.png", ".."])
def test_list_entries_stay_in_their_folder(tmp_path, entry):
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "lists" / "a.png")
    (tmp_path / "lists" / "train.txt").write_text(f"a.png\n{entry}\n")
    with pytest.raises(
        ValueError, match=r"leads out of the folder of the list: write it as an absolute path"
    ):
        list_images(tmp_path / "lists" / "train.txt", confined=True)
    with pytest.raises(ValueError, match="leads out of the folder"):
        open_source(str(tmp_path / "lists" / "train.txt"), "unused")


def test_list_may_name_folders(tmp_path):
    expected = [write_image(tmp_path / "z" / name) for name in ("1.png", "2.png")]
    single = write_image(tmp_path / "a.png")
    (tmp_path / "all.txt").write_text("z\na.png\n")
    assert list_images(tmp_path / "all.txt") == [*expected, single]


def test_list_keeps_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_image(tmp_path / name)
    (tmp_path / "all.txt").write_bytes(b"caf\xe9.png\n")
    assert list_images(tmp_path / "all.txt") == [tmp_path / name]
    assert list_images(tmp_path) == [tmp_path / name]


def test_list_with_missing_files(tmp_path):
    write_image(tmp_path / "here.png")
    lines = ["here.png", *(f"gone{index}.png" for index in range(5))]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    with pytest.raises(FileError, match=r"5 of the 6 entries") as error:
        list_images(tmp_path / "train.txt")
    message = str(error.value)
    assert "first gone0.png; gone1.png; gone2.png. " in message
    assert message.endswith(f"one path and nothing else, absolute or relative to {tmp_path}")


def test_prose_is_no_list(tmp_path):
    """A line that is too long for a file name is an entry that does not exist, not an error of the system."""
    (tmp_path / "readme.txt").write_text("word " * 1000)
    with pytest.raises(FileError, match=r"1 of the 1 entries of .*readme\.txt do not exist") as error:
        list_images(tmp_path / "readme.txt")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("line", ["rgb.png depth.png 518.8579", "/rgb.png /depth.png 518.8579"])
def test_list_with_several_columns(tmp_path, line):
    write_image(tmp_path / "rgb.png")
    (tmp_path / "train.txt").write_text(line)
    with pytest.raises(FileError, match=r"one path and nothing else, .*, such as rgb\.png$"):
        list_images(tmp_path / "train.txt")


def test_sources_that_are_no_list(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match=r"names no image"):
        list_images(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"is a single image"):
        list_images(write_image(tmp_path / "a.png"))
    (tmp_path / "shard.tar").write_bytes(b"name\0\0\0data")
    with pytest.raises(ValueError, match=r"not a text file"):
        list_images(tmp_path / "shard.tar")


# ----------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(tmp_path, file_format):
    (tmp_path / "image").write_bytes(encoded(Image.fromarray(noise()), file_format))
    assert np.array_equal(pixels(tmp_path / "image"), noise())


def test_lossless_webp_and_wrong_extension(tmp_path):
    (tmp_path / "image.jpg").write_bytes(encoded(Image.fromarray(noise()), "WEBP", lossless=True))
    assert np.array_equal(pixels(tmp_path / "image.jpg"), noise())


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, file_format):
    upright = cv2.resize(noise(3, 4), (32, 24), interpolation=cv2.INTER_NEAREST)
    # How a camera stores the scene, by the EXIF standard: what its row 0 and its column 0 are of the scene.
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright[:, ::-1].transpose(1, 0, 2),  # right, top
        7: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: upright[::-1].transpose(1, 0, 2),  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(file_format, {})
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, **lossless)
    (tmp_path / "image").write_bytes(data)

    found = pixels(tmp_path / "image")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (4 if file_format == "JPEG" else 0)


def test_multi_picture_jpeg(tmp_path):
    first, second = Image.new("RGB", (32, 24), "red"), Image.new("RGB", (32, 24), "blue")
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "phone.jpg") as image:
        assert image.format == "MPO"
    assert np.abs(pixels(tmp_path / "phone.jpg").astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    data = encoded(Image.fromarray(noise()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (tmp_path / "image.jpg").write_bytes(data)
    assert pixels(tmp_path / "image.jpg").shape == (24, 32, 3)


def test_grey_and_bilevel(tmp_path):
    grey = noise(channels=0)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))

    bits = grey > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert np.array_equal(pixels(tmp_path / "bits.png")[..., 0], bits * np.uint8(255))


def test_palette(tmp_path):
    image = Image.fromarray(noise()).quantize(16)
    image.save(tmp_path / "palette.png")
    assert np.array_equal(pixels(tmp_path / "palette.png"), np.asarray(image.convert("RGB")))
    image.save(tmp_path / "misnamed.gif")
    assert np.array_equal(pixels(tmp_path / "misnamed.gif"), np.asarray(image.convert("RGB")))


def test_transparency_is_composited_over_white(tmp_path):
    colour, alpha = noise(), noise(channels=0, seed=1)
    alpha[:4], alpha[4:8] = 0, 255
    share = alpha[..., None] / 255
    expected = colour * share + 255 * (1 - share)

    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "rgba.png")
    found = pixels(tmp_path / "rgba.png")
    assert np.abs(found - expected).max() <= 1
    assert (found[:4] == 255).all()
    assert np.array_equal(found[4:8], colour[4:8])

    Image.fromarray(np.dstack([colour[..., 0], alpha])).save(tmp_path / "la.png")
    assert np.abs(pixels(tmp_path / "la.png")[..., 1] - expected[..., 0]).max() <= 1

    indices = np.zeros((8, 8), np.uint8)
    indices[4:] = 1
    palette = Image.new("P", (8, 8))
    palette.putdata(indices.ravel().tolist())
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=0)
    found = pixels(tmp_path / "palette.png")
    assert (found[:4] == 255).all()
    assert (found[4:] == [40, 50, 60]).all()


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    for name, options in [("a.jpg", {"quality": 100}), ("a.tif", {})]:
        cmyk.save(tmp_path / name, **options)
        assert np.abs(pixels(tmp_path / name).astype(int) - [255, 0, 0]).max() <= 2


def test_16_bit_grey(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257  # the 16-bit value of each 8-bit level
    expected = np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    Image.fromarray(levels.astype(">u2")).save(tmp_path / "big_endian.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5\n16 16\n65535\n" + levels.astype(">u2").tobytes())
    for name in ["a.png", "a.tif", "big_endian.tif", "a.pgm"]:
        assert np.array_equal(pixels(tmp_path / name), expected), name

    # Between two levels the nearest is taken, and nothing runs over at the top.
    Image.fromarray(np.array([[0, 128, 129, 65406, 65407, 65535]], np.uint16)).save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png")[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("extension", [".png", ".tif", ".ppm"])
def test_16_bit_colour(tmp_path, extension):
    values = np.random.default_rng(0).integers(0, 65536, (24, 32, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"a{extension}"), values[..., ::-1])
    assert np.abs(pixels(tmp_path / f"a{extension}") - values / 257).max() <= 1


def test_float_and_32_bit(tmp_path):
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(unit).save(tmp_path / "unit.tif")
    assert np.array_equal(pixels(tmp_path / "unit.tif")[..., 0], np.arange(256).reshape(16, 16))

    unit[3, 3] = np.nan
    Image.fromarray(unit).save(tmp_path / "nan.tif")
    Image.fromarray(np.array([[0, 200]], np.float32)).save(tmp_path / "wide.tif")
    Image.fromarray(np.array([[0, 200]], np.int32)).save(tmp_path / "int.tif")
    for name in ["nan.tif", "wide.tif", "int.tif"]:
        with pytest.raises(ValueError, match=r"no known white level"):
            read_image(tmp_path / name)


TRUNCATED = {
    "JPEG": "jpg",
    "PNG": "png",
    "BMP": "bmp",
    "WEBP": "webp",
    "TIFF": "tif",
    "PPM": "ppm",
    "GIF": "gif",
}


@pytest.mark.parametrize("file_format", TRUNCATED)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files_fail(tmp_path, monkeypatch, file_format, share):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as careless code elsewhere does
    data = encoded(Image.fromarray(noise(48, 64)), file_format)
    path = tmp_path / f"cut.{TRUNCATED[file_format]}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises((OSError, SyntaxError)):
        read_image(path)
    with pytest.raises((OSError, SyntaxError, UnreadableImageError)):
        open_picture(path.read_bytes()).pixels()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_huge_images_fail_before_they_are_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(huge_png())
    with pytest.raises(ValueError, match=r"60000 x 60000 pixels are more than max_pixels = 178956970"):
        read_image(tmp_path / "bomb.png")


def test_limit_of_pixels_is_ours_both_ways(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = write_image(tmp_path / "a.png")
    assert pixels(image, max_pixels=24 * 32).shape == (24, 32, 3)
    with pytest.raises(ValueError, match=r"32 x 24 pixels are more than max_pixels = 767"):
        read_image(image, max_pixels=24 * 32 - 1)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list


# ----------------------------------------------------------------------------------------------------
# Augmentation
# ----------------------------------------------------------------------------------------------------


def test_transform_is_the_official_one():
    official = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                48, scale=(0.67, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    image = Image.fromarray(noise(90, 120))
    ours = PretrainTransform((48, 48))
    normalise = Normalise(ours.mean, ours.std, fused=True)
    std = torch.tensor(ours.std)[:, None, None]
    for seed in range(20):
        torch.manual_seed(seed)
        expected = official(image)
        torch.manual_seed(seed)
        found = ours(picture(image))
        assert found.shape == (3, 48, 48)
        assert found.dtype == torch.uint8
        levels = (normalise(found[None])[0] - expected) * std * 255
        # Rounded once more or less, and, of noise, the last bits of the filter's weights.
        assert levels.abs().max() < 3
        assert levels.abs().mean() < 0.1
    torch.manual_seed(7)
    expected = ours(picture(image))
    torch.manual_seed(7)
    assert torch.equal(PretrainTransform(48)(picture(image)), expected)


def test_normalise_keeps_the_memory_format():
    batch = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = transforms.Normalize(mean, std)(batch.double() / 255)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = Normalise(mean, std, fused=True)(batch.contiguous(memory_format=memory_format))
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture [H, W, 3] uint8 without fine detail, in which every place looks different."""
    rows, columns = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    channels = [rows, columns, 0.5 + 0.5 * np.sin(9 * rows) * np.cos(7 * columns)]
    return (255 * np.stack(channels, axis=2)).round().astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(301, 203), (208, 304), (800, 640)])
def test_pixels_of_a_jpeg_are_those_of_the_whole_file(size, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(smooth(*size)), "JPEG", quality=95, exif=exif)
    (tmp_path / "image.jpg").write_bytes(content)
    found = open_picture(content)
    assert isinstance(found, JpegPicture)
    whole = pixels(tmp_path / "image.jpg")
    assert (found.height, found.width) == whole.shape[:2]
    assert np.array_equal(found.pixels(), whole)
    for reduce in (2, 4, 8):
        reduced = found.pixels(reduce)
        assert reduced.shape == (-(-whole.shape[0] // reduce), -(-whole.shape[1] // reduce), 3)
        if not any(side % reduce for side in size):
            expected = cv2.resize(whole, reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
            assert np.abs(reduced.astype(int) - expected).mean() < 2


def test_decoding_stays_above_the_resolution_of_the_result(monkeypatch):
    asked = []
    whole = JpegPicture.pixels

    def watched(self, reduce=1):
        values = whole(self, reduce)
        asked.append((reduce, values.shape))
        return values

    monkeypatch.setattr(JpegPicture, "pixels", watched)
    for height, width, expected in [
        (200, 150, {1}),
        (500, 375, {1}),
        (900, 1000, {4}),
        (1900, 1900, {8}),
        (90, 2000, {1}),
    ]:
        image = Image.fromarray(smooth(height, width))
        content, transform = encoded(image, "JPEG", quality=95), PretrainTransform((120, 96))
        for seed in range(15):
            torch.manual_seed(seed)
            reduced = transform(open_picture(content)).float()
            torch.manual_seed(seed)
            with_all = transform(picture(image)).float()
            assert (reduced - with_all).abs().mean() < 2  # of 255
        for reduce, (decoded_height, decoded_width, _) in asked:
            # A crop covers at least two thirds of the area with sides that differ by 4/3 at most.
            assert reduce == 1 or (decoded_height >= 180 and decoded_width >= 144)
        assert {reduce for reduce, _ in asked} <= expected | {1, 2}
        assert expected & {reduce for reduce, _ in asked}
        asked.clear()


def test_a_cut_jpeg_is_unreadable_when_it_is_decoded():
    content = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    with pytest.raises(UnreadableImageError, match="truncated"):
        open_picture(content[: len(content) // 2]).pixels()


def test_a_jpeg_with_stray_bytes_is_read_as_pillow_reads_it(tmp_path):
    content = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    scan = content.index(b"\xff\xda")
    stray = content[:scan] + b"\x00\x00" + content[scan:]
    (tmp_path / "stray.jpg").write_bytes(stray)
    assert np.array_equal(open_picture(stray).pixels(), pixels(tmp_path / "stray.jpg"))


@pytest.mark.parametrize("shape", [(4, 4, 2), (4, 4, 4), (4,), (0, 4, 3)])
def test_raw_pictures_refuse(shape):
    with pytest.raises(ValueError, match=r"pixels must be uint8|without pixels"):
        RawPicture(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="not float32"):
        RawPicture(np.zeros((4, 4, 3), np.float32))


def test_flip_probability():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
    for probability, flips in [(0.0, {False}), (1.0, {True}), (0.5, {False, True})]:
        transform = PretrainTransform(32, hflip=probability)
        torch.manual_seed(0)
        found = [transform(picture(ramp))[0, 0] for _ in range(12)]
        assert {bool(row[0] > row[-1]) for row in found} == flips


def test_rectangle_stretches_no_more_than_a_square():
    """Crops of a picture of its own coordinates show how they were stretched."""
    height, width = 128, 384
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    coordinates = Image.fromarray(np.dstack([rows, columns / 2, 0 * rows]).astype(np.uint8))
    transform = PretrainTransform((32, 96), hflip=0)
    torch.manual_seed(0)
    shares = []
    for _ in range(50):
        crop = transform(picture(coordinates)).float()
        assert crop.shape == (3, 32, 96)
        # Slopes in source pixels per result pixel, away from the borders that bicubic filtering bends.
        down = (crop[0, -6, 48] - crop[0, 5, 48]) / (32 - 11)
        across = 2 * (crop[1, 16, -6] - crop[1, 16, 5]) / (96 - 11)
        assert 0.70 < across / down < 1.43  # 3/4 to 4/3, and the rounding of small numbers
        shares.append(float(down * 32 * across * 96) / (height * width))
    assert min(shares) > 0.62
    assert max(shares) < 1.05
    assert np.std(shares) > 0.05  # random, not the centre crop that torchvision falls back to


def test_one_channel():
    image = Image.fromarray(noise())
    transform = PretrainTransform(16, in_chans=1)
    assert transform.mean == pytest.approx([0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406])
    assert transform.std == pytest.approx([0.299 * 0.229 + 0.587 * 0.224 + 0.114 * 0.225])
    torch.manual_seed(3)
    found = transform(picture(image))
    assert found.shape == (1, 16, 16)
    assert found.dtype == torch.uint8
    torch.manual_seed(3)
    colour = PretrainTransform(16)(picture(image))
    expected = Image.fromarray(colour.permute(1, 2, 0).numpy()).convert("L")
    assert np.array_equal(found[0].numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_degenerate_images(size):
    torch.manual_seed(0)
    image = PretrainTransform((32, 48))(picture(Image.new("RGB", size, "red")))
    assert image.shape == (3, 32, 48)
    assert (image == torch.tensor([255, 0, 0])[:, None, None]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_chans": 4},
            r"in_chans is 4: give data\.mean and data\.std, 4 numbers each, .*ImageNet's are for colour",
        ),
        (
            {"in_chans": 4, "mean": (0.5,) * 4},
            r"give data\.mean and data\.std, .*--data\.std \[0\.5,0\.5,0\.5,0\.5\]",
        ),
        ({"in_chans": 1, "mean": (0.5, 0.5, 0.5)}, r"mean has 3 values for 1 channels: give one a channel"),
        ({"std": (0.5,)}, r"std has 1 values for 3 channels"),
        ({"std": (0.2, 0.2, 0.0)}, r"std must be above 0"),
    ],
)
def test_transform_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PretrainTransform(**arguments)


# ----------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight files, of which 3 (truncated), 4 (no image) and 7 (huge) cannot be read."""
    for index in range(8):
        write_image(tmp_path / f"{index}.png", seed=index)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:500])
    (tmp_path / "4.png").write_text("version https://git-lfs")
    (tmp_path / "7.png").write_bytes(huge_png())
    return tmp_path


@pytest.fixture
def dataset(folder) -> UnlabeledImages:
    return folder_of(folder, PretrainTransform((16, 16)), seed=5)


def test_sample_is_a_function_of_seed_and_position(dataset, folder):
    sample = dataset[(11, 2)]
    assert sample["position"] == 11
    assert sample["index"] == 2
    assert sample["failed"] == []
    assert len(dataset) == 8
    assert sample["name"] == dataset.source.name(2) == str(folder / "2.png")

    torch.manual_seed(derive_seed(5, 11))
    assert torch.equal(sample["image"], PretrainTransform((16, 16))(RawPicture(noise(seed=2))))
    torch.rand(100)
    assert torch.equal(sample["image"], dataset[(11, 2)]["image"])
    assert not torch.equal(sample["image"], dataset[(12, 2)]["image"])
    other = UnlabeledImages(dataset.source, SampleReader(dataset.reader.transform, seed=6))
    assert not torch.equal(sample["image"], other[(11, 2)]["image"])


def test_reading_leaves_the_generator_alone(dataset):
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    dataset[(0, 0)]
    assert torch.equal(torch.rand(5), expected)


def test_next_readable_image_takes_the_place(dataset, folder):
    sample = dataset[(20, 3)]
    assert sample["index"] == 5
    assert torch.equal(sample["image"], dataset[(20, 5)]["image"])
    truncated, text = sample["failed"]
    assert truncated.startswith(f"{folder}/3.png: ")
    assert "truncated" in truncated
    assert text == f"{folder}/4.png: not an image of a known kind, or its header is damaged"

    sample = dataset[(21, 7)]  # after the last file comes the first
    assert sample["index"] == 0
    assert sample["failed"] == [f"{folder}/7.png: 60000 x 60000 pixels are more than max_pixels = 178956970"]


def test_file_that_vanished(dataset, folder):
    (folder / "0.png").unlink()
    sample = dataset[(0, 0)]
    assert sample["index"] == 1
    assert sample["failed"] == [f"{folder}/0.png: No such file or directory"]


def test_no_readable_image(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(b"")
    dataset = folder_of(tmp_path, PretrainTransform(16))
    with pytest.raises(ValueError, match=r"5 images .* none could be read: .*0\.jpg: not an image"):
        dataset[(0, 3)]


def test_too_many_unreadable_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_CONSECUTIVE_FAILURES", 4)
    for index in range(6):
        (tmp_path / f"{index}.jpg").write_bytes(b"")
    write_image(tmp_path / "6.png")
    dataset = folder_of(tmp_path, PretrainTransform(16))
    assert len(dataset[(0, 3)]["failed"]) == 3
    with pytest.raises(ValueError, match=r"4 images were tried one after another"):
        dataset[(0, 2)]


def test_bugs_of_a_transform_are_not_taken_for_bad_images(folder):
    def broken(image):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        folder_of(folder, broken)[(0, 0)]


def test_dataset_refuses():
    with pytest.raises(ValueError, match="at least one image file"):
        FileSource([])


def test_batches_do_not_depend_on_workers(dataset):
    stream = [(position, (position * 3) % 8) for position in range(40, 56)]
    batches = [stream[start : start + 4] for start in range(0, 16, 4)]
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate_images)
        runs.append(list(loader))
    assert len(runs[0]) == len(runs[1]) == 4
    for alone, shared in zip(*runs, strict=True):
        assert alone["image"].shape == (4, 3, 16, 16)
        assert alone["position"].dtype == alone["index"].dtype == torch.int64
        for key in ("image", "position", "index"):
            assert torch.equal(alone[key], shared[key])
        assert alone["failed"] == shared["failed"]
    assert torch.cat([batch["position"] for batch in runs[0]]).tolist() == list(range(40, 56))
    failed = [failure for batch in runs[0] for failure in batch["failed"]]
    assert len({failure.split(": ")[0] for failure in failed}) == 3


# ----------------------------------------------------------------------------------------------------
# The count of failures
# ----------------------------------------------------------------------------------------------------


def test_failures_are_counted_once(tmp_path):
    unreadable = UnreadableImages(100, 0.02)
    assert unreadable.add(["b.png: no", "b.png: no"]) == ["b.png: no"]
    assert unreadable.add(["b.png: other reason"]) == []
    assert unreadable.add(["a: odd name.png: also no"]) == ["a: odd name.png: also no"]
    assert len(unreadable) == 2
    unreadable.report(tmp_path / "skipped_images.txt")
    assert (tmp_path / "skipped_images.txt").read_text() == "a: odd name.png: also no\nb.png: no\n"


def test_share_of_failures(tmp_path):
    unreadable = UnreadableImages(100, 0.02)
    unreadable.add(["a: x", "b: x"])
    with pytest.raises(
        ValueError, match=r"3 of 100 images could not be read, more than .* share of 0\.02"
    ) as error:
        unreadable.add(["c: y", "a: x"])
    assert "First a: x; b: x; c: y" in str(error.value)
    assert "data.max_unreadable" in str(error.value)
    unreadable.report(tmp_path / "skipped_images.txt")
    assert (tmp_path / "skipped_images.txt").read_text().count("\n") == 3

    with pytest.raises(ValueError, match="1 of 10"):
        UnreadableImages(10, 0.0).add(["a: x"])
    UnreadableImages(2, 1.0).add(["a: x", "b: x"])
    few = UnreadableImages(10, 0.01)  # a tenth of a file is one file
    few.add(["a: x"])
    with pytest.raises(ValueError, match="2 of 10 images"):
        few.add(["b: x"])


def test_no_report_without_failures(tmp_path):
    unreadable = UnreadableImages(10, 0.0)
    unreadable.add([])
    unreadable.report(tmp_path / "skipped_images.txt")
    assert not (tmp_path / "skipped_images.txt").exists()


def test_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    unreadable = UnreadableImages(10, 0.5)
    unreadable.add(["a: x"])
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"the disk is full, .*skipped_images\.txt was not written"):
        unreadable.report(tmp_path / "skipped_images.txt")
    assert list(tmp_path.iterdir()) == []


def test_count_survives_a_checkpoint(tmp_path):
    unreadable = UnreadableImages(10, 0.5)
    unreadable.add(["a: x", os.fsdecode(b"caf\xe9.png") + ": x"])
    torch.save(unreadable.state_dict(), tmp_path / "state.pt")
    resumed = UnreadableImages(10, 0.5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.reasons == unreadable.reasons
    assert resumed.add(["a: x"]) == []
    resumed.report(tmp_path / "skipped_images.txt")
    assert (tmp_path / "skipped_images.txt").read_bytes() == b"a: x\ncaf\xe9.png: x\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image of a known kind"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "or its header is damaged"),
    ],
)
def test_reasons_can_be_told_from_paths(tmp_path, content, reason):
    bad = tmp_path / "a: b.png"
    bad.write_bytes(content)
    good = write_image(tmp_path / "good.png")
    failed = UnlabeledImages(FileSource([bad, good]), SampleReader(PretrainTransform(16), seed=0))[(0, 0)][
        "failed"
    ]
    unreadable = UnreadableImages(2, 1.0)
    unreadable.add(failed)
    assert list(unreadable.reasons) == [str(bad)]
    assert reason in unreadable.reasons[str(bad)]
    assert "\n" not in failed[0]


@pytest.mark.real_data
def test_real_photos(real_data):
    files = list_images(real_data / "images")
    assert len(files) > 1000
    assert files == sorted(files)
    dataset = UnlabeledImages(FileSource(files), SampleReader(PretrainTransform((96, 128)), seed=0))
    chosen = torch.linspace(0, len(files) - 1, 32).long().tolist()
    batch = collate_images([dataset[(position, index)] for position, index in enumerate(chosen)])
    assert batch["failed"] == []
    assert batch["index"].tolist() == chosen
    assert batch["image"].shape == (32, 3, 96, 128)
    pixels = Normalise(dataset.reader.transform.mean, dataset.reader.transform.std, fused=True)(
        batch["image"]
    )
    assert pixels.mean().abs() < 0.5  # normalised with ImageNet's statistics, so roughly 0 and 1
    assert 0.7 < pixels.std() < 1.4
