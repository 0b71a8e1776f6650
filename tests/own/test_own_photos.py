"""Anyone's photos: positions from EXIF data, held the right way up, antialiased."""

import math
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import refusal, results_of, rows_of
from PIL import ExifTags, Image, ImageOps
from sklearn.metrics.pairwise import haversine_distances

from datasets.check import main as check
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.exif import gps_position, gps_positions
from datasets.photos.positions import EARTH_RADIUS, haversine_metres
from datasets.photos.transforms import read_pixels


def gps_exif(latitude, longitude, **tags):
    """EXIF data as a phone writes it: whole degrees and minutes, hundredths of a second, and a letter for the sign.

    Tags given by name replace these, None removes one.
    """

    def sexagesimal(value):
        minutes, seconds = divmod(round(abs(value) * 360_000), 6000)
        return (float(minutes // 60), float(minutes % 60), seconds / 100)

    exif = Image.Exif()
    written = {
        "GPSLatitudeRef": "N" if latitude >= 0 else "S",
        "GPSLatitude": sexagesimal(latitude),
        "GPSLongitudeRef": "E" if longitude >= 0 else "W",
        "GPSLongitude": sexagesimal(longitude),
        **tags,
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS[name]: value for name, value in written.items() if value is not None}
    return exif


def turned_exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.fixture
def photo(tmp_path):
    """Writes a photo of noise and returns its path."""

    def write(name, *, exif=None, size=(160, 120), seed=0, **settings):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        if exif is not None:
            settings["exif"] = exif
        Image.fromarray(pixels).resize(size).save(path, **settings)
        return str(path)

    return write


@pytest.mark.parametrize("degrees", [(-33.856784, 151.215297), (40.689249, -74.0445), (-0.000278, 0.0)])
def test_gps(photo, degrees):
    for name in ("a.jpg", "a.png"):
        position = gps_position(photo(name, exif=gps_exif(*degrees)))
        assert position == pytest.approx(degrees, abs=0.006 / 3600)  # half of a hundredth of a second


def test_no_gps(photo):
    signed = gps_exif(38.0, 2.0, GPSLatitude=(38.0, 1.0, 31.0)).tobytes()
    signed = signed.replace(b"\0\2\0\5\0\0\0\3", b"\0\2\0\x0a\0\0\0\3")  # as rationals with a sign
    signed = signed.replace(struct.pack(">2I", 38, 1), struct.pack(">2i", -38, 1))
    (read := Image.Exif()).load(signed)
    assert read.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (-38, 1, 31)
    kinds = [
        None,
        gps_exif(48.0, 2.0, GPSLongitudeRef=None),
        gps_exif(48.0, 2.0, GPSLatitudeRef="X"),
        gps_exif(-33.0, 151.0, GPSLatitudeRef=" "),
        gps_exif(0.0, 0.0),  # without a fix
        gps_exif(95.0, 2.0),  # nowhere on earth
        gps_exif(48.0, 2.0, GPSLatitude=(48.0, 30.0)),
        signed,
    ]
    assert np.isnan(gps_positions([photo(f"{n}.jpg", exif=exif) for n, exif in enumerate(kinds)])).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif"])
def test_photos_are_turned_once_as_exif_says_for_plain_folders_only(photo, suffix):
    for orientation in range(1, 9):
        settings = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": turned_exif(orientation)}
        path = photo(f"{orientation}.{suffix}", **settings)
        upright = read_pixels(path, upright=True)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert expected.shape == ((120, 160, 3) if orientation < 5 else (160, 120, 3))
        assert np.array_equal(upright.permute(1, 2, 0).numpy(), expected)
        if suffix in ("jpg", "png"):  # of which datasets are, and are read as stored
            assert read_pixels(path).shape == (3, 120, 160)


def test_odd_exif(photo):
    exif = turned_exif(6)
    exif[ExifTags.Base.Make] = "maker"
    # The maker's tag turned into the image's width: text where a number belongs.
    odd = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    for suffix in ("jpg", "png"):
        assert read_pixels(photo(f"odd.{suffix}", exif=odd), upright=True).shape == (3, 160, 120)
        garbage = photo(f"garbage.{suffix}", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
        assert read_pixels(garbage, upright=True).shape == (3, 120, 160)
        assert read_pixels(photo(f"none.{suffix}", exif=turned_exif(9)), upright=True).shape == (3, 120, 160)
    # XMP data in front of the EXIF data, as some programs write it.
    path = Path(photo("xmp.jpg", exif=turned_exif(6)))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    stored = path.read_bytes()
    path.write_bytes(stored[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + stored[2:])
    assert read_pixels(path, upright=True).shape == (3, 160, 120)


# A street of Paris: a database photo every 20 m northwards, and queries 4 m beside the first two and far away.
METRE = 1 / 111_195.0  # in degrees of latitude
HOME = (48.8584, 2.2945)


@pytest.fixture
def walk(photo, tmp_path):
    for n in range(5):
        photo(f"map/IMG_{n}.jpg", exif=gps_exif(HOME[0] + 20 * n * METRE, HOME[1]), seed=n)
    for n in range(2):
        east = 4 * METRE / math.cos(math.radians(HOME[0]))
        photo(f"today/IMG_{n}.jpg", exif=gps_exif(HOME[0] + 20 * n * METRE, HOME[1] + east), seed=n)
    photo("today/IMG_2.jpg", exif=gps_exif(HOME[0] + 1, HOME[1]), seed=7)
    return tmp_path / "map", tmp_path / "today"


def test_positives_and_distances_by_gps(walk):
    dataset = DatabaseQueries.from_folders(*walk, name="walk", exif=True)
    assert dataset.geographic
    assert [sorted(found.tolist()) for found in dataset.positives(25.0)] == [[0, 1], [0, 1, 2], []]
    metres = dataset.metres(np.array([[0, 1], [4, 1], [0, 0]]))
    # A degree is 111,195 m of latitude on the mean sphere; GPS as written is within 0.4 m.
    expected = [[4, math.hypot(4, 20)], [math.hypot(4, 60), 4], [111_195, 111_195]]
    np.testing.assert_allclose(metres, expected, atol=0.6)


def test_distances_over_the_sphere():
    """As scikit-learn computes them, from a metre to the other side of the earth."""
    degrees = np.random.default_rng(0).uniform((-90, -180), (90, 180), (200, 2))
    degrees = np.concatenate((degrees, degrees[:50] + 1e-5, [[90, 0], [-90, 0], [0, 180], [0, -180], [0, 0]]))
    expected = EARTH_RADIUS * haversine_distances(np.radians(degrees))
    np.testing.assert_allclose(haversine_metres(degrees[:, None], degrees[None]), expected, rtol=1e-9, atol=1e-6)


def test_a_map_of_phone_photos_is_asked_by_what_is_in_their_exif_data(walk, photo, evaluated, tmp_path, capsys):
    folders = f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}"
    made = evaluated(*folders, f"--save_map={tmp_path}/walk.npz", "--save_predictions=3")
    page = (made / "matches" / "index.html").read_text()
    assert re.search(r"\b[34]\.\d m, similarity", page) and "111.2 km, similarity" in page
    assert results_of(made)["options"]["antialias"] is True
    shutil.rmtree(walk[0])
    ask = f"--map={tmp_path}/walk.npz", f"--queries_folder={walk[1]}"
    asked = evaluated(*ask, "--save_predictions=3")
    recalls = [results_of(folder)["recalls"] for folder in (made, asked)]
    assert recalls[0] == recalls[1] and recalls[0]["1"] == pytest.approx(200 / 3)
    told = [[(row["metres"], row["correct"], row["database_latitude"]) for row in rows_of(of)] for of in (made, asked)]
    assert told[0] == told[1] and float(told[0][0][0]) == pytest.approx(4, abs=0.6)
    photo("today/@1@2@.jpg")  # UTM metres, which degrees cannot be compared with
    evaluated(*ask)
    assert "1 of 4 queries have no position" in capsys.readouterr().err
    for path in walk[1].glob("IMG*"):
        path.unlink()
    evaluated(*ask)
    assert "none of the 1 queries has a position in EXIF data" in capsys.readouterr().err


@pytest.mark.parametrize("some_named", [False, True])
def test_check_gives_the_remedy_of_photos_without_a_position_once(some_named, photo, tmp_path, capsys):
    """A position counts in names or EXIF data, whichever more photos have; where none has one, folders are named."""
    lost = [photo(f"{folder}/lost_{n}.jpg", seed=n) for n, folder in enumerate(("map", "map", "today"))]
    folders = [f"{tmp_path}/map", f"{tmp_path}/today"]
    assert check([*folders, "--workers=1"]) == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    for line, folder in zip(lines[:2], folders, strict=True):
        assert line.startswith(f"no-position: {folder}: ") and "--no_labels" in line
    assert lines[2] == "2 faults in 3 images"
    photo("map/found.jpg", exif=gps_exif(*HOME), seed=9)
    if some_named:
        photo("today/@1@2@.jpg", exif=gps_exif(*HOME), seed=8)
    assert check([*folders, "--workers=1"]) == 1
    *_, first, second, third, last = capsys.readouterr().out.splitlines()
    for line, path in zip((first, second, third), lost, strict=True):
        assert line.startswith(f"no-position: {path}: ") and ("name all photos @<UTM" in line) == (line is first)
    assert last == f"3 faults in {4 + some_named} images"


def test_photos_without_a_position_are_searched_but_not_counted(walk, photo, evaluated, capsys):
    """The walk, a copy of whose last query lies in the database without a position, and a query without one."""
    photo("map/lost.jpg", seed=7)
    photo("today/lost.jpg", seed=0)
    folders = f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}"
    folder = evaluated(*folders, "--save_predictions=6", "--save_assignments=2")
    shown = capsys.readouterr().err
    assert "1 of 6 database images and 1 of 4 queries have no position" in shown
    assert "Recalls on today in map (6 database, 4 queries, 3 of them with a position): R@1: 66.7" in shown
    results = results_of(folder)
    assert results["recalls"]["1"] == pytest.approx(200 / 3) and results["recalls"]["5"] == pytest.approx(200 / 3)
    assert results["dataset"]["queries_with_position"] == 3
    for row in rows_of(folder):
        known = "lost" not in row["query"] and "lost" not in row["database"]
        assert row["correct"] in (("0", "1") if known else ("",))
    page = (folder / "matches" / "index.html").read_text()
    assert page.count('class="unknown"') == 4 + 6 - 1 and "nan" not in page
    assert "first match wrong (0)" in page  # the first match of the far query is the photo without a position
    assert "no correct match among 6 (1)" in page


def test_photos_without_a_name_of_theirs_and_what_more_photos_have_counts(photo, tmp_path, caplog):
    for name in ("map/@1000@0@.jpg", "map/lost.jpg", "today/@1010@0@.jpg", "today/@9000@0@.jpg", "today/lost.jpg"):
        photo(name)
    sides = tmp_path / "map", tmp_path / "today"
    dataset = DatabaseQueries.from_folders(*sides, name="x", exif=True)
    assert [images.tolist() for images in dataset.positives(25.0)] == [[0], [], []]
    assert dataset.judged_queries.tolist() == [True, True, False]
    assert str(dataset) == "x (2 database, 3 queries, 2 of them with a position)"
    metres = dataset.metres(np.array([[0, 1], [1, 0], [0, 1]]))
    np.testing.assert_array_equal(metres, [[10, np.nan], [np.nan, 8000], [np.nan, np.nan]])
    with pytest.raises(ValueError, match="2 of 5 .* e.g. .*map/lost.jpg.*--no_labels"):
        DatabaseQueries.from_folders(*sides, name="x")

    here = gps_exif(*HOME)
    for name in ("map/lost.jpg", "today/lost.jpg", "today/@1010@0@.jpg"):
        photo(name, exif=here)
    dataset = DatabaseQueries.from_folders(*sides, name="x", exif=True)
    assert not dataset.geographic and dataset.positives(25.0)[0].tolist() == [0]
    assert "3 photos have UTM coordinates in their names and 3 a position in their EXIF data" in caplog.text
    photo("map/b.jpg", exif=here)
    dataset = DatabaseQueries.from_folders(*sides, name="x", exif=True)
    assert dataset.geographic and dataset.positives(25.0)[0].tolist() == [1, 2]
    assert "the more common is used: EXIF" in caplog.text


def test_sides_of_two_kinds_are_compared_in_degrees(photo, tmp_path, caplog):
    """A database from the downloader, and a phone's queries."""
    for n in range(3):
        photo(f"map/@448{n:03}.0@5411932.0@31@U@{HOME[0] + 20 * n * METRE:.6f}@{HOME[1]}@key{n}@.jpg")
    photo("today/IMG_1.jpg", exif=gps_exif(HOME[0] + 20 * METRE, HOME[1]))
    dataset = DatabaseQueries.from_folders(tmp_path / "map", tmp_path / "today", name="x", exif=True)
    assert dataset.geographic and [sorted(found.tolist()) for found in dataset.positives(10.0)] == [[1]]
    np.testing.assert_allclose(dataset.metres(np.array([[0, 1, 2]])), [[20, 0, 20]], atol=0.5)
    assert [line for line in caplog.messages if "in degrees" in line]


def test_a_side_without_any_position_is_refused(photo, tmp_path, capsys, evaluated):
    photo("map/a.jpg")
    photo("today/b.jpg", exif=gps_exif(*HOME))
    folders = f"--database_folder={tmp_path}/map", f"--queries_folder={tmp_path}/today"
    line = refusal(capsys, lambda: evaluated(*folders))
    assert "none of the 1 database images has a position" in line and "no_labels" in line
    assert not (evaluated(*folders, "--no_labels") / "recalls.png").exists()


def test_places_are_told_without_labels(walk, photo, evaluated):
    """A robot's question: where is this, which has no position itself?"""
    photo("today/sub/nowhere.jpg", seed=3)
    photo("map/nowhere.jpg", seed=9)
    folder = evaluated(f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}", "--no_labels")
    rows = rows_of(folder)
    assert {row["correct"] for row in rows} == {""}
    (answer,) = [row for row in rows if row["query"].endswith("nowhere.jpg") and row["rank"] == "1"]
    assert answer["database"].endswith("IMG_3.jpg") and answer["metres"] == ""
    assert float(answer["database_latitude"]) == pytest.approx(HOME[0] + 60 * METRE, abs=2e-6)
    assert float(answer["database_longitude"]) == pytest.approx(HOME[1], abs=2e-6)
    (first,) = [row for row in rows if "today/IMG_0" in row["query"] and "IMG_2" in row["database"]]
    assert float(first["metres"]) == pytest.approx(math.hypot(4, 40), abs=0.6)
    assert {row["database_latitude"] for row in rows if row["database"].endswith("nowhere.jpg")} == {""}
