"""Pixels of every mode that Pillow opens: the bytes they become, that it is said, and how they are resized."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from datasets.check import main as check
from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform, open_image, open_noted, read_pixels

RAMP = np.arange(0, 65_536, 1024, dtype=np.uint16).reshape(8, 8)  # 0 to 64,512
RAMP[0, 0], RAMP[7, 7] = 255, 65_535


def tiff(pixels, *, bits, photometric=1, samples=1, extra=None, sample_format=1, order="<", shape=None):
    """An uncompressed TIFF with tags that Pillow reads but does not write."""
    height, width = shape or pixels.shape[:2]
    data = bytes(pixels)
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * samples), 259: (3, [1]), 262: (3, [photometric])}
    tags |= {273: (4, [8]), 277: (3, [samples]), 278: (4, [height]), 279: (4, [len(data)])}
    tags |= {339: (3, [sample_format] * samples)} if sample_format != 1 else {}
    tags |= {338: (3, [extra])} if extra is not None else {}
    start = 8 + len(data) + len(data) % 2
    entries, behind = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", start + 2 + 12 * len(tags) + 4 + len(behind))
            behind += packed
            packed = place
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + data.ljust(start - 8, b"\0") + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0" + behind


def pillow(pixels, kind, **settings):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file := io.BytesIO(), kind, **settings)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    """Reads the content of a file: H x W x 3, and how more than 8 bits became 8."""

    def run(content):
        (tmp_path / "photo.png").write_bytes(content)  # Pillow goes by the content
        image, how = open_noted(tmp_path / "photo.png")
        assert image.mode == "RGB"
        assert torch.equal(read_pixels(tmp_path / "photo.png"), torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return np.asarray(image), how

    return run


@pytest.mark.parametrize(
    "content",
    [
        pillow(RAMP, "PNG"),
        pillow(RAMP, "TIFF"),
        pillow(RAMP, "PPM"),
        pillow(RAMP, "JPEG2000", irreversible=False),
        tiff(RAMP.astype(">u2"), bits=16, order=">"),
        tiff(65_535 - RAMP, bits=16, photometric=0),  # zero is white
    ],
    ids=["PNG", "TIFF", "PGM", "JPEG2000", "TIFF, big-endian", "TIFF, white is zero"],
)
def test_grey_of_16_bits_is_its_upper_8(read, content):
    pixels, how = read(content)
    np.testing.assert_array_equal(pixels, np.repeat((RAMP // 256)[..., None], 3, axis=2))
    assert "bits" in how


def test_grey_of_12_bits_in_a_tiff(read):
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in ((0, 4095), (256, 2048)))
    pixels, how = read(tiff(packed, bits=12, shape=(2, 2)))
    assert pixels[..., 0].tolist() == [[0, 255], [16, 128]] and "12 bits" in how


@pytest.mark.parametrize(("samples", "photometric"), [(3, 2), (4, 2), (4, 5)])
def test_colour_of_16_bits_is_its_upper_8(read, samples, photometric):
    colour = np.random.default_rng(0).integers(0, 65_536, (8, 8, samples), dtype=np.uint16)
    pixels, how = read(tiff(colour, bits=16, samples=samples, photometric=photometric))
    of_8 = (colour // 256).astype(np.uint8)
    expected = Image.fromarray(of_8, "CMYK").convert("RGB") if photometric == 5 else Image.fromarray(of_8[..., :3])
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert "bits" in how


@pytest.mark.parametrize("white", [65_535, 1023])
def test_colour_of_16_bits_in_a_ppm(read, white):
    colour = np.random.default_rng(0).integers(0, white + 1, (8, 8, 3), dtype=np.uint16)
    pixels, how = read(f"P6 8 8 {white}\n".encode() + colour.astype(">u2").tobytes())
    np.testing.assert_allclose(pixels, colour * (255 / white), atol=0.5 + 1e-9)
    assert "bits" in how
    assert read(pillow(SQUARE, "PPM"))[1] == ""


SQUARE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
PALETTE = SQUARE.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
UNIT = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


@pytest.mark.parametrize(
    ("mode", "content"),
    [
        ("F", pillow(UNIT, "TIFF")),
        ("F", pillow(UNIT, "PPM")),  # PFM
        ("I", pillow((200 * UNIT).astype(np.int32), "TIFF")),
        ("I", tiff((RAMP // 2).astype(np.int16), bits=16, sample_format=2)),
    ],
    ids=["F", "PFM", "I", "signed 16"],
)
def test_grey_of_no_known_scale_is_refused(read, mode, content):
    with pytest.raises(ValueError, match=rf"photo.png \(mode {mode}, .* convert it to 8 or 16 bits"):
        read(content)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (pillow(SQUARE.convert("1"), "PNG"), "1"),
        (pillow(SQUARE.convert("LA"), "PNG"), "LA"),
        (pillow(PALETTE, "PNG", transparency=0), "P"),
        (pillow(PALETTE, "PNG", transparency=bytes(range(0, 240, 30))), "P"),
        (pillow(PALETTE, "GIF", transparency=0), "P"),
        (pillow(PALETTE.convert("PA"), "TIFF"), "PA"),
        (pillow(SQUARE, "WEBP", lossless=True), "RGB"),
        (pillow(SQUARE.convert("RGBA"), "PNG"), "RGBA"),
        (pillow(SQUARE.convert("RGBX"), "TIFF"), "RGB"),
        (pillow(SQUARE.convert("CMYK"), "TIFF"), "CMYK"),
        (pillow(SQUARE.convert("YCbCr"), "TIFF"), "YCbCr"),
        (tiff(np.asarray(SQUARE), bits=8, samples=3, photometric=8), "LAB"),
    ],
)  # fmt: skip
def test_8_bits_a_channel_are_what_pillow_makes_of_them(read, content, mode):
    pixels, how = read(content)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert how == ""


def test_colours_multiplied_by_their_opacity_are_divided_again(read):
    grey_and_opacity = np.array([[[100, 255], [50, 128], [0, 0]]], dtype=np.uint8)
    pixels, _ = read(tiff(grey_and_opacity, bits=8, samples=2, extra=1))
    np.testing.assert_allclose(pixels[0, :, 0], [100, 100, 0], atol=1)


@pytest.mark.parametrize("threads", [0, 2])
def test_the_log_counts_them_and_the_checker_names_each(tmp_path, caplog, capsys, threads):
    paths = [tmp_path / name for name in ("a.png", "b.tiff", "c.png", "d.jpg")]
    for path, pixels in zip(paths, (RAMP // 16, RAMP, *[(RAMP // 256).astype(np.uint8)] * 2), strict=True):
        Image.fromarray(pixels).save(path)
    settings = {"transform": evaluation_transform((8, 8)), "batch_size": 3, "device": torch.device("cpu")}
    images = image_batches(list(map(str, paths)), **settings, num_workers=threads, progress="town queries")
    assert list(map(len, images)) == [3, 1]
    (line,) = caplog.messages
    assert line.startswith("town queries: 2 images read by the upper 8 of more bits") and f"e.g. {paths[0]};" in line

    (tmp_path / "no.tiff").write_bytes(pillow(UNIT, "TIFF"))
    assert check([str(tmp_path), "--workers", "1"]) == 1
    shown = capsys.readouterr().out
    assert f"16-bit: {paths[0]}: grey of 16 bits" in shown and "4095 of 65535" in shown and "2 notes" in shown
    assert f"unreadable: {tmp_path}/no.tiff: mode F, " in shown and "convert it to 8 or 16" in shown


SIDEWAYS = Image.Exif()  # an orientation that neither way of reading applies
SIDEWAYS[0x0112] = 6


def test_evaluation_resize_does_not_antialias_unless_asked():
    photo = torch.randint(0, 256, (1, 3, 280, 280), dtype=torch.uint8)
    plain = evaluation_transform((28, 28))(photo)
    smooth = evaluation_transform((28, 28), antialias=True)(photo)
    assert plain.shape == smooth.shape == (1, 3, 28, 28)
    assert plain.std() > 2 * smooth.std()


@pytest.mark.parametrize(
    ("mode", "name", "settings"),
    [
        ("RGB", "a.jpg", {}),
        ("RGB", "a.JPEG", {"progressive": True, "quality": 40}),
        ("RGB", "a.jpg", {"subsampling": 0, "quality": 95}),
        ("RGB", "a.jpg", {"subsampling": 1}),
        ("RGB", "a.jpg", {"exif": SIDEWAYS}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "a.png", {}),
        ("P", "a.png", {}),
        ("L", "png_in_truth.jpg", {"format": "PNG"}),
    ],
)
def test_pixels_are_those_of_pillow(city, tmp_path, mode, name, settings):
    photo = Image.open(next((city / "toy_city/images/test/queries").iterdir())).resize((97, 61))
    photo.convert(mode).save(tmp_path / name, **settings)
    pixels = read_pixels(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 61, 97)
    assert torch.equal(pixels, pil_to_tensor(open_image(tmp_path / name)))
