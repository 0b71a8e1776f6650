"""Every mode that Pillow opens: the bytes it becomes, and that it is said."""

import io
import logging
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.check import main as check
from datasets.photos.batches import ImageList
from datasets.photos.pixel_modes import Depth
from datasets.photos.transforms import open_image, open_noted, read_pixels
from utils.system.reading import read_batches

RAMP = np.arange(0, 65_536, 1024, dtype=np.uint16).reshape(8, 8)  # 0 to 64,512
RAMP[0, 0], RAMP[7, 7] = 255, 65_535


def tiff(pixels, *, bits, photometric=1, samples=1, extra=None, sample_format=1, order="<"):
    """An uncompressed TIFF with tags that Pillow reads but does not write."""
    height, width = pixels.shape[:2]
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
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
    """Reads the content of a file: H x W x 3, and how."""

    def run(content):
        (tmp_path / "photo.png").write_bytes(content)  # Pillow goes by the content
        image, depth, _ = open_noted(tmp_path / "photo.png")
        assert image.mode == "RGB"
        assert torch.equal(read_pixels(tmp_path / "photo.png"), torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return np.asarray(image), depth

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
    pixels, depth = read(content)
    np.testing.assert_array_equal(pixels, np.repeat((RAMP // 256)[..., None], 3, axis=2))
    assert depth is Depth.SIXTEEN


def test_grey_of_12_bits_in_a_tiff(read):
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in ((0, 4095), (256, 2048)))

    class Pixels(bytes):
        shape = (2, 2)

    pixels, depth = read(tiff(Pixels(packed), bits=12))
    assert pixels[..., 0].tolist() == [[0, 255], [16, 128]] and depth is Depth.SIXTEEN


@pytest.mark.parametrize(("samples", "photometric"), [(3, 2), (4, 2), (4, 5)])
def test_colour_of_16_bits_is_its_upper_8(read, samples, photometric):
    colour = np.random.default_rng(0).integers(0, 65_536, (8, 8, samples), dtype=np.uint16)
    pixels, depth = read(tiff(colour, bits=16, samples=samples, photometric=photometric))
    of_8 = (colour // 256).astype(np.uint8)
    expected = Image.fromarray(of_8, "CMYK").convert("RGB") if photometric == 5 else Image.fromarray(of_8[..., :3])
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert depth is Depth.SIXTEEN


@pytest.mark.parametrize("white", [65_535, 1023])
def test_colour_of_16_bits_in_a_ppm(read, white):
    colour = np.random.default_rng(0).integers(0, white + 1, (8, 8, 3), dtype=np.uint16)
    pixels, depth = read(f"P6 8 8 {white}\n".encode() + colour.astype(">u2").tobytes())
    np.testing.assert_allclose(pixels, colour * (255 / white), atol=0.5 + 1e-9)
    assert depth is Depth.SIXTEEN
    assert read(pillow(SQUARE, "PPM"))[1] is Depth.STORED


SQUARE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
UNIT = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pillow(UNIT, "TIFF"), np.rint(255 * UNIT)),
        (pillow(UNIT, "PPM"), np.rint(255 * UNIT)),  # PFM
        (pillow(200 * UNIT, "TIFF"), np.rint(200 * UNIT)),
        (pillow(60_000 * UNIT, "TIFF"), 60_000 * UNIT // 256),
        (tiff(1 - UNIT, bits=32, sample_format=3, photometric=0), np.rint(255 * UNIT)),
        (pillow((200 * UNIT).astype(np.int32), "TIFF"), (200 * UNIT).astype(np.int32)),
        (pillow(RAMP.astype(np.int32), "TIFF"), RAMP // 256),
        (tiff((RAMP // 2).astype(np.int16), bits=16, sample_format=2), RAMP // 512),
    ],
    ids=["F to 1", "PFM to 1", "F to 255", "F to 65535", "F, white is zero", "I to 255", "I to 65535", "signed 16"],
)
def test_scales_that_are_guessed(read, content, expected):
    pixels, depth = read(content)
    np.testing.assert_allclose(pixels, np.repeat(expected[..., None], 3, axis=2), atol=1 if expected is None else 0)
    assert depth is Depth.GUESSED


@pytest.mark.parametrize(
    "pixels",
    [
        np.float32([[0, 1e6]]),
        np.float32([[0, np.nan]]),
        np.float32([[0, np.inf]]),
        np.float32([[-1, 1]]),
        np.int32([[0, 65_536]]),
        np.int32([[-1, 9]]),
    ],
)
def test_values_of_no_known_scale_are_refused(read, pixels):
    with pytest.raises(ValueError, match=r"cannot read the image .*photo.png \(values from .*, whose scale is unknown"):
        read(pillow(pixels, "TIFF"))


def palette(mode):
    """Whose first colour is transparent."""
    image = SQUARE.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    return image if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (pillow(SQUARE.convert("1"), "PNG"), "1"),
        (pillow(SQUARE.convert("L"), "PNG"), "L"),
        (pillow(SQUARE.convert("LA"), "PNG"), "LA"),
        (pillow(palette("P"), "PNG"), "P"),
        (pillow(palette("P"), "PNG", transparency=0), "P"),
        (pillow(palette("P"), "PNG", transparency=bytes(range(0, 240, 30))), "P"),
        (pillow(palette("P"), "GIF", transparency=0), "P"),
        (pillow(palette("PA"), "TIFF"), "PA"),
        (pillow(SQUARE, "WEBP", lossless=True), "RGB"),
        (pillow(SQUARE.convert("RGBA"), "PNG"), "RGBA"),
        (pillow(SQUARE.convert("RGBX"), "TIFF"), "RGB"),
        (pillow(SQUARE.convert("CMYK"), "TIFF"), "CMYK"),
        (pillow(SQUARE.convert("CMYK"), "JPEG"), "CMYK"),
        (pillow(SQUARE.convert("YCbCr"), "TIFF"), "YCbCr"),
        (tiff(np.asarray(SQUARE), bits=8, samples=3, photometric=8), "LAB"),
    ],
)  # fmt: skip
def test_8_bits_a_channel_are_what_pillow_makes_of_them(read, content, mode):
    pixels, depth = read(content)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert depth is Depth.STORED


def test_what_has_no_file_of_its_own_converts_too():
    """Modes that only programs make; Pillow may open one some day."""
    from datasets.photos.pixel_modes import to_rgb

    for mode in ("HSV", "RGBX", "RGBa", "La", "I;16L", "I;16N"):
        image, _, _ = to_rgb(Image.new(mode, (2, 2)))
        assert image.mode == "RGB"


def test_colours_multiplied_by_their_opacity_are_divided_again(read):
    grey_and_opacity = np.array([[[100, 255], [50, 128], [0, 0]]], dtype=np.uint8)
    pixels, _ = read(tiff(grey_and_opacity, bits=8, samples=2, extra=1))
    np.testing.assert_allclose(pixels[0, :, 0], [100, 100, 0], atol=1)


@pytest.mark.parametrize("threads", [0, 2])
def test_the_log_counts_them(tmp_path, caplog, threads):
    caplog.set_level(logging.INFO)
    paths = [tmp_path / name for name in ("a.png", "b.tiff", "c.png", "d.jpg", "e.tiff")]
    for path, pixels in zip(paths, (RAMP, RAMP, RAMP // 256, RAMP // 256, UNIT), strict=True):
        Image.fromarray(pixels if pixels.dtype != np.uint16 or pixels.max() > 255 else pixels.astype(np.uint8)).save(
            path
        )
    images = ImageList(list(map(str, paths)))
    assert list(read_batches(images.__getitem__, len, [range(3), range(3, 5)], threads=threads)) == [3, 2]
    images.log_depths("town queries")
    sixteen, guessed = caplog.messages
    assert (
        sixteen.startswith("town queries: 2 images read by the upper 8 of more bits") and f"e.g. {paths[0]};" in sixteen
    )
    assert guessed.startswith("town queries: 1 image in a mode whose scale was guessed") and "e.tiff" in guessed


def test_check_tells_of_them(tmp_path, capsys):
    for name, pixels in (("dark.png", RAMP // 16), ("white.pfm", UNIT), ("usual.png", (RAMP // 256).astype(np.uint8))):
        Image.fromarray(pixels).save(tmp_path / name, "PPM" if name.endswith("pfm") else None)
    (tmp_path / "no.tiff").write_bytes(pillow(np.float32([[0, 1e6]]), "TIFF"))
    assert check([str(tmp_path), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"16-bit: {tmp_path}/dark.png: grey of 16 bits, read as value / 256 (its brightest is 4095 of 65535)",
        f"unreadable: {tmp_path}/no.tiff: values from 0 to 1e+06, whose scale is unknown: convert it to 8 or 16 "
        "bits; replace or remove it",
        f"guessed: {tmp_path}/white.pfm: mode F, whose scale is guessed: values up to 1 read as 255 x value",
        f"no-position: {tmp_path}: no photo has a position: neither EXIF nor a file name gives one; use --no_labels",
        "2 faults in 4 images, 2 notes",
    ]


def test_training_reads_them_alike(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[..., 1].tolist() == (RAMP // 256).tolist()
