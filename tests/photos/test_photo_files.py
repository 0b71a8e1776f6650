"""Which files count as photos, and what is said of the others."""

import os
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from helpers import refusal, results_of, rows_of
from PIL import ExifTags, Image

from datasets.check import main as check
from datasets.photos.exif import gps_positions
from datasets.photos.listing import PHOTO_SUFFIXES, list_images, scan
from datasets.photos.positions import like_degrees
from datasets.photos.transforms import open_image, prepare, read_pixels
from datasets.training.gsv_cities import find_cities


@pytest.fixture
def photo(tmp_path):
    """Writes a small photo of noise, a different one each time, and returns its path."""

    def write(name, **settings):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(list(tmp_path.rglob("*"))))
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(path, **settings)
        return path

    return write


@pytest.fixture
def evaluated(evaluated, tmp_path, capsys):
    """Evaluates `known` and `asked`, or a dataset; returns what the terminal showed and the run's folder."""

    def run(*flags, queries="asked", dataset=None):
        given = [f"--database_folder={tmp_path}/known", f"--queries_folder={tmp_path}/{queries}"]
        if dataset:
            given = [f"--eval_datasets_folder={tmp_path}/data", f"--eval_dataset_name={dataset}"]
        folder = evaluated("--recall_values=1", *given, *flags)
        return capsys.readouterr().err, folder

    return run


def below(folder, paths):
    return [os.path.relpath(path, folder) for path in paths]


def test_names_that_begin_with_a_dot_are_no_photos(tmp_path, photo):
    for name in ("a.jpg", "._a.jpg", ".thumbs/a.jpg", "b/.c/d/a.jpg", "b/a.jpg", "b/.hidden.png", ".a.heic"):
        photo(name, format="JPEG")
    listing = scan(tmp_path, PHOTO_SUFFIXES)
    assert below(tmp_path, listing.paths) == ["a.jpg", "b/a.jpg"] and listing.left_out == ""
    hidden = tmp_path / "b" / ".c"  # which is asked for by its name
    assert below(hidden, list_images(hidden)) == ["d/a.jpg"]


@pytest.mark.parametrize(
    ("links", "kept", "not_followed"),
    [
        ({"b/loop": "b"}, ["b/2.jpg", "c/3.jpg"], 1),
        ({"b/above": ".."}, ["b/2.jpg", "c/3.jpg"], 1),
        ({"a": "b"}, ["b/2.jpg", "c/3.jpg"], 1),  # the folder itself, whatever is first by name
        ({"z": "../away", "y": "../away", "b/x": "../away"}, ["b/2.jpg", "c/3.jpg", "y/5.jpg", "y/in/4.jpg"], 2),
        ({"y": "../away/in", "z": "../away"}, ["b/2.jpg", "c/3.jpg", "y/4.jpg", "z/5.jpg"], 0),
        ({"y": "../away/in", "../away/in/back": "."}, ["b/2.jpg", "c/3.jpg", "y/4.jpg"], 1),
    ],
)
def test_a_folder_is_visited_once(tmp_path, photo, links, kept, not_followed):
    for name in ("root/b/2.jpg", "root/c/3.jpg", "away/in/4.jpg", "away/5.jpg"):
        photo(name)
    root = tmp_path / "root"
    for link, target in links.items():
        (root / link).symlink_to((root / target).resolve())
    listing = scan(root)
    assert below(root, listing.paths) == kept and len(listing.links) == not_followed


def test_the_order_of_the_disk_does_not_matter(tmp_path, photo, monkeypatch):
    for n in range(6):
        photo(f"d{n}/{n}.jpg")
        (tmp_path / f"l{n}").symlink_to(tmp_path / f"d{(n + 1) % 6}")
    expected = scan(tmp_path)
    real = os.scandir

    monkeypatch.setattr(os, "scandir", lambda folder: nullcontext(list(real(folder))[::-1]))
    assert scan(tmp_path) == expected and len(expected.paths) == 6


def test_left_out_files_are_counted_by_suffix(tmp_path, photo, caplog):
    photo("a.jpg")
    for name in ("b.HEIC", "c.heic", "d.mov", "README", "sub/e.Json", ".DS_Store", "f.jpg.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to("sub")
    assert below(tmp_path, list_images(tmp_path, PHOTO_SUFFIXES)) == ["a.jpg"]
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: left out 6 files (2 .heic, 1 ")
    assert all(f"1 {kind}" in line for kind in (".mov", ".json", ".txt", "without suffix"))
    assert f" and 1 link to folders already listed, e.g. {tmp_path}/again; convert photos to JPEG" in line
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image .* in .*, but 6 files \(2 .heic, .*converted"):
        list_images(tmp_path, PHOTO_SUFFIXES)


def test_every_format_of_photos_is_read_in_plain_folders_only(tmp_path, photo, evaluated):
    kinds = "jpg jpeg png webp avif bmp gif tif tiff jp2 ppm tga jfif".split()
    for number, suffix in enumerate(kinds):
        path = photo(f"known/{number:02d}.{suffix}")
        shutil.copy(path, photo(f"asked/{number:02d}.{suffix.upper()}"))
    (tmp_path / "asked" / "movie.mp4").touch()
    shown, folder = evaluated("--no_labels")
    first = [row for row in rows_of(folder) if row["rank"] == "1"]
    assert len(first) == len(kinds)
    assert all(row["query"].lower()[-6:] == row["database"][-6:] for row in first if "gif" not in row["query"].lower())
    (line,) = [line for line in shown.splitlines() if "left out" in line]
    assert f"{tmp_path}/asked: left out 1 file (1 .mp4); convert photos to JPEG" in line

    for side in ("database", "queries"):
        photo(f"data/town/images/test/{side}/@0@0@.jpg")
        photo(f"data/town/images/test/{side}/@0@0@.webp")
    shown, _ = evaluated(dataset="town")
    assert "Recalls on town test (1 database, 1 queries)" in shown
    assert shown.count("left out 1 file (1 .webp); in datasets only .jpg, .jpeg and .png count") == 2


def test_pipes_and_devices_are_no_photos(tmp_path, photo, caplog, capsys):
    photo("a.jpg")
    photo("away.jpg").rename(tmp_path / "away")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.png").symlink_to("b.jpg")
    (tmp_path / "d.jpg").symlink_to(os.devnull)
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub" / "notes")
    os.mkfifo(tmp_path / ".hidden.jpg")
    (tmp_path / "linked.jpg").symlink_to("away")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert below(tmp_path, list_images(tmp_path)) == ["a.jpg", "broken.jpg", "linked.jpg", "loop.jpg"]
    (line,) = caplog.messages
    assert f"{tmp_path}: left out 5 files (4 pipe, socket or device, 1 without suffix)" in line
    for name in ("broken.jpg", "loop.jpg"):
        (tmp_path / name).unlink()
    check([str(tmp_path), "--workers", "1"])
    assert "5 files (4 pipe, socket or device, 1 without suffix) skipped" in capsys.readouterr().out


@pytest.fixture
def places(photo, tmp_path):
    """Three known places, and photos of two of them, named by their positions."""
    for n in range(3):
        photo(f"known/@{1000 * n}@0@known@.png")
    for n in range(2):
        (tmp_path / "asked").mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"known/@{1000 * n}@0@known@.png", tmp_path / f"asked/@{1000 * n}@0@asked@.png")
    return tmp_path


@pytest.mark.parametrize("how", ["below", "links", "hard links", "linked folder"])
def test_queries_among_the_database_are_left_out_of_it(places, evaluated, how):
    if how == "below":
        shutil.move(places / "asked", places / "known" / "asked")
        (places / "asked").symlink_to(places / "known" / "asked")
    elif how == "linked folder":
        (places / "known" / "more").symlink_to(places / "asked")
    else:
        for path in (places / "asked").iterdir():
            new = places / "known" / path.name
            new.symlink_to(path) if how == "links" else new.hardlink_to(path)
    shown, folder = evaluated()
    assert f"2 of the 5 photos in {places}/known are also queries: they are left out of the database" in shown
    assert "asked in known (3 database, 2 queries): R@1: 100.0" in shown
    assert not any("asked" in row["database"] for row in rows_of(folder))


def test_nothing_left_of_the_database(places, evaluated, capsys):
    (places / "all").mkdir()
    (places / "all" / "known").symlink_to(places / "known")
    for queries in ("known", "all"):
        line = refusal(capsys, lambda queries=queries: evaluated(queries=queries))
        assert f"every photo in {places}/known is also a query, in {places / queries}; name a " in line
    (places / "asked" / "more.png").symlink_to(places / "known" / "@0@0@known@.png")
    for n in (1000, 2000):
        (places / f"known/@{n}@0@known@.png").write_bytes(b"")
    line = refusal(capsys, lambda: evaluated("--skip_unreadable"))
    assert f"every photo in {places}/known that can be read is also a query" in line


def test_a_dataset_keeps_queries_among_its_database(places, evaluated):
    for side, source in (("database", "known"), ("queries", "asked")):
        shutil.copytree(places / source, places / "data/town/images/test" / side)
    images = places / "data/town/images/test"
    (images / "database" / "@9000@0@.png").symlink_to(next((images / "queries").iterdir()))
    shown, folder = evaluated(dataset="town")
    assert f"1 of the 4 photos in {images}/database are also queries: they find themselves, and stay" in shown
    assert results_of(folder)["dataset"]["database"] == 4


def test_unreadable_photos_are_left_out_when_asked(places, evaluated, capsys):
    bad = places / "known" / "@1000@0@known@.png"
    bad.write_bytes(bad.read_bytes()[:200])
    empty = places / "asked" / "@5@5@.webp"
    empty.touch()
    shown, folder = evaluated("--skip_unreadable")
    assert f"1 of 3 photos in {places}/known cannot be read and are left out: {bad}" in shown
    assert f"1 of 3 photos in {places}/asked cannot be read and are left out: {empty}" in shown
    assert "(2 database, 2 queries): R@1: 50.0" in shown
    assert "cannot read the image" in (folder / "debug.log").read_text()
    for path in (places / "asked").iterdir():
        path.write_bytes(b"")
    line = refusal(capsys, lambda: evaluated("--skip_unreadable"))
    assert f"none of the 3 photos in {places}/asked can be read" in line


def test_unreadable_photos_of_datasets_and_positives(places, evaluated):
    """Left out of datasets too when asked, and indices still count all that the folder holds."""
    for side, source in (("database", "known"), ("queries", "asked")):
        shutil.copytree(places / source, places / "data/town/images/test" / side)
    (places / "data/town/images/test/database/@0@0@known@.png").write_bytes(b"no photo")
    (places / "right.csv").write_text("query,database\n0,0\n1,1\n")
    shown, _ = evaluated("--skip_unreadable", f"--positives_file={places}/right.csv", dataset="town")
    assert "1 of 3 photos in" in shown and "(2 database, 2 queries): R@1: 50.0" in shown


def test_an_unreadable_photo_ends_a_run_that_did_not_ask(places, evaluated, capsys):
    (places / "asked" / "@5@5@.png").write_bytes(b"no photo")
    line = refusal(capsys, evaluated)
    assert "cannot read the image" in line and "with --skip_unreadable" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "HEIC .*convert it to JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404", "HTML page"),
        (None, "a link to moved.jpg, which is not there"),
    ],
)
def test_what_a_file_is_instead_of_a_photo_is_said(tmp_path, capsys, content, said):
    """In what reads it, and by the checker."""
    path = tmp_path / "a.jpg"
    path.symlink_to("moved.jpg") if content is None else path.write_bytes(content)
    for upright in (False, True):
        with pytest.raises(ValueError, match=f"{path} .*{said}.*--skip_unreadable"):
            read_pixels(path, upright=upright)
    assert check([str(tmp_path), "--workers", "1"]) == 1
    assert re.search(f"unreadable: {path}: .*{said}", capsys.readouterr().out)


def test_a_jpeg_of_any_size_is_read_everywhere(photo, monkeypatch):
    """Pillow's limit, which torchvision does not have, is lowered here: 80 x 60 are more than twice as many pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path, grey = str(photo("a.jpg", exif=exif)), str(photo("b.jpg"))
    Image.open(grey).convert("CMYK").save(grey)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert read_pixels(path).shape == (3, 60, 80) and read_pixels(path, upright=True).shape == (3, 80, 60)
    assert np.isnan(gps_positions([path])).all() and open_image(grey).size == (80, 60)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_a_callers_errors_for_deprecation_meet_none(places, photo, evaluated):
    for folder in ("known", "asked"):
        photo(f"{folder}/@9000@0@more@.jpg")
    assert prepare(photo("a.jpg")).shape == (3, 322, 322)
    assert "R@1" in evaluated("--save_predictions=1", "--num_workers=2")[0]


def test_hidden_tables_are_no_cities(tmp_path):
    (tmp_path / "Dataframes").mkdir()
    for name in ("London", "._London"):
        (tmp_path / "Dataframes" / f"{name}.csv").write_bytes(b"\x00\x05\xff")
    assert find_cities(tmp_path) == ["London"]


def test_check_of_plain_folders(places, photo, capsys):
    assert check([f"{places}/known", "--workers", "1"]) == 0
    capsys.readouterr()
    (places / "known" / "a.heic").touch()
    (places / "known" / "notes.txt").touch()
    (places / "asked" / "bad.jpg").write_bytes(b"no photo")
    (places / "asked" / "linked.png").symlink_to(places / "known" / "@0@0@known@.png")
    assert check([f"{places}/known", f"{places}/asked", "--workers", "2"]) == 1
    *_, totals = lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{places}/known, 3 photos", f"{places}/asked, 4 photos"]
    assert [line.split(": ")[:2] for line in lines[2:-1]] == [
        ["left-out", f"{places}/known"],
        ["left-out", f"{places}/known"],
        ["shared", f"{places}/asked"],
        ["duplicate", f"{places}/asked/@0@0@asked@.png"],
        ["duplicate", f"{places}/asked/@1000@0@asked@.png"],
        ["unreadable", f"{places}/asked/bad.jpg"],
    ]
    assert ".heic) not read" in lines[2] and ".txt) skipped" in lines[3] and totals == "5 faults in 7 images, 1 note"


def test_check_of_one_folder_in_another(places, capsys):
    """A query's copies among the other photos are told, and so is a link to a photo of the same folder."""
    shutil.move(places / "asked", places / "known" / "asked")
    known, asked = places / "known", places / "known" / "asked"
    (asked / "@2000@0@linked@.png").symlink_to(known / "@2000@0@known@.png")
    for folders, shared, copies in (((known, asked), 3, 3), ((asked, known), 4, 2)):
        assert check([*map(str, folders), "--workers", "1"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines[2:-1]] == ["shared", *["duplicate"] * copies]
        assert f"photos also in {folders[0]}: {shared};" in lines[2]


def test_check_of_the_same_folder_twice(places, capsys, monkeypatch):
    monkeypatch.chdir(places)
    (places / "link").symlink_to("known")
    again = ["./known/", "link", f"{places}/asked/../known"]
    assert check(["known", *again, "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"{folder.rstrip('/').removeprefix('./')}, the same folder as known: checked once" for folder in again),
        "known, 3 photos",
        "no fault in 3 images",
    ]


def test_check_of_a_dataset_tells_what_is_left_out(places, capsys):
    for side, source in (("database", "known"), ("queries", "asked")):
        shutil.copytree(places / source, places / "town/images/test" / side)
    for path in (places / "town/images/test/queries").iterdir():
        path.write_bytes(path.read_bytes() + b"\0")  # no copies
    (places / "town/images/test/database/._@0@0@.png").touch()
    (places / "town/images/test/database/list.mat").touch()
    assert check([f"{places}/town", "--workers", "1"]) == 0
    assert "1 file (1 .mat) skipped" in (shown := capsys.readouterr().out) and "no fault in 5 images, 1 note" in shown
    (places / "town/images/test/queries/@0@0@.webp").touch()
    assert check([f"{places}/town", "--workers", "1"]) == 1
    assert "queries: 1 file (1 .webp) not read; convert" in capsys.readouterr().out


@pytest.mark.parametrize(("exact", "strays", "warned"), [(9, 1, True), (8, 1, False), (20, 2, True), (20, 3, False)])
@pytest.mark.parametrize("stray", [(0, 500000), (500000, 4e6), (-179.5, 179.5)])
def test_a_stray_position_hides_no_degrees(exact, strays, warned, stray):
    degrees = [(48.85 + n, -2.35 * n) for n in range(exact)]
    for order in (1, -1):
        positions = np.array([*degrees, *[stray] * strays, (np.nan, np.nan)])[:, ::order]
        assert like_degrees(positions) == warned
    for metres in ((12, 80), (181.5, 0.5)):  # whole numbers, and beyond 180
        assert not like_degrees(np.array([*[metres] * exact, *[stray] * strays], dtype=float))


def test_degrees_in_names_are_told_where_they_are_only_shown(places, evaluated):
    for n, path in enumerate(sorted((places / "known").iterdir())):
        path.rename(path.with_name(f"@48.{n}@2.{n}@.png"))
    (places / "right.csv").write_text("query,database\n0,0\n1,1\n")
    for flag in ("--no_labels", f"--positives_file={places}/right.csv"):
        shown, _ = evaluated(flag)
        assert shown.count("the positions of the database images look like degrees (nearly all within 90") == 1
        assert "the positions of the queries look" not in shown


def test_a_missing_folder_is_told_by_its_first_missing_part(tmp_path):
    for name in ("gsv_cities", "toy_city", ".hidden"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no toycity, only gsv_cities, toy_city; check "):
        list_images(tmp_path / "toycity/images/test/database")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/toy_city has no images; check "):
        list_images(tmp_path / "toy_city/images/test/database")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/file is a file; check "):
        list_images(tmp_path / "file")
