"""Which files count as photos, and what is said of the others."""

import os
import re
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from helpers import refusal, results_of
from PIL import ExifTags, Image

from datasets.check import main as check
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.exif import gps_positions
from datasets.photos.listing import PHOTO_SUFFIXES, list_images, scan
from datasets.photos.positions import like_degrees
from datasets.photos.transforms import open_image, prepare, read_pixels


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
def listed(tmp_path):
    """Lists the plain folders `known` and `asked`, or the dataset `town`."""

    def run(queries="asked", dataset=None, **settings):
        if dataset:
            return DatabaseQueries.from_folder(tmp_path / "data", dataset, "test", **settings)
        return DatabaseQueries.from_folders(tmp_path / "known", tmp_path / queries, name="x", exif=True, **settings)

    return run


def below(folder, paths):
    return [os.path.relpath(path, folder) for path in paths]


def test_names_that_begin_with_a_dot_are_no_photos(tmp_path, photo):
    for name in ("a.jpg", "._a.jpg", ".thumbs/a.jpg", "b/.c/d/a.jpg", "b/a.jpg", "b/.hidden.png", ".a.heic"):
        photo(name, format="JPEG")
    listing = scan(tmp_path, PHOTO_SUFFIXES)
    assert below(tmp_path, listing.paths) == ["a.jpg", "b/a.jpg"] and listing.left_out == ""
    assert below(tmp_path, list_images(tmp_path / "b/.c")) == ["b/.c/d/a.jpg"], "asked for by its name"


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
def test_a_folder_is_visited_once(tmp_path, photo, links, kept, not_followed, monkeypatch):
    """Whatever the order of the disk."""
    for name in ("root/b/2.jpg", "root/c/3.jpg", "away/in/4.jpg", "away/5.jpg"):
        photo(name)
    root = tmp_path / "root"
    for link, target in links.items():
        (root / link).symlink_to((root / target).resolve())
    listing = scan(root)
    assert below(root, listing.paths) == kept and len(listing.links) == not_followed
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: nullcontext([*real(folder)][::-1]))
    assert scan(root) == listing


def test_pipes_and_devices_are_no_photos(tmp_path, photo, caplog, capsys):
    photo("a.jpg")
    photo("away.jpg").rename(tmp_path / "away")
    (tmp_path / "sub").mkdir()
    for pipe in ("b.jpg", "sub/notes", ".hidden.jpg"):
        os.mkfifo(tmp_path / pipe)
    links = {"c.png": "b.jpg", "d.jpg": os.devnull, "linked.jpg": "away", "broken.jpg": "nowhere"}
    for link, target in (links | {"loop.jpg": "loop.jpg"}).items():
        (tmp_path / link).symlink_to(target)
    assert below(tmp_path, list_images(tmp_path)) == ["a.jpg", "broken.jpg", "linked.jpg", "loop.jpg"]
    (line,) = caplog.messages
    assert f"{tmp_path}: left out 5 files (4 pipe, socket or device, 1 without suffix)" in line
    for name in ("broken.jpg", "loop.jpg"):
        (tmp_path / name).unlink()
    check([str(tmp_path), "--workers", "1"])
    assert "5 files (4 pipe, socket or device, 1 without suffix) skipped" in capsys.readouterr().out


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


def test_every_format_of_photos_is_read_in_plain_folders(tmp_path, photo, listed, caplog):
    kinds = "jpg jpeg png webp avif bmp gif tif tiff jp2 ppm tga jfif".split()
    for number, suffix in enumerate(kinds):
        path = photo(f"known/{number:02d}.{suffix}")
        shutil.copy(path, photo(f"asked/{number:02d}.{suffix.upper()}"))
    (tmp_path / "asked" / "movie.mp4").touch()
    dataset = listed(labelled=False)
    assert len(dataset.database_paths) == len(dataset.queries_paths) == len(kinds)
    for a, b in zip(dataset.database_paths, dataset.queries_paths, strict=True):
        assert torch.equal(read_pixels(a), read_pixels(b))
    assert caplog.messages == [f"{tmp_path}/asked: left out 1 file (1 .mp4); convert photos to JPEG"]


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
def test_queries_among_the_database_are_left_out_of_it(places, listed, caplog, how):
    if how == "below":
        shutil.move(places / "asked", places / "known" / "asked")
        (places / "asked").symlink_to(places / "known" / "asked")
    elif how == "linked folder":
        (places / "known" / "more").symlink_to(places / "asked")
    else:
        for path in (places / "asked").iterdir():
            new = places / "known" / path.name
            new.symlink_to(path) if how == "links" else new.hardlink_to(path)
    dataset = listed()
    assert f"2 of the 5 photos in {places}/known are also queries: they are left out of the database" in caplog.text
    assert len(dataset.database_paths) == 3 and not any("asked" in path for path in dataset.database_paths)


def test_a_file_of_positives_counts_queries_that_are_then_left_out_of_the_database(places, listed, caplog):
    (places / "known" / "more").symlink_to(places / "asked")
    (places / "right.csv").write_text("query,database\n0,2\n0,3\n1,more/@1000@0@asked@.png\n")
    dataset = listed(positives_file=places / "right.csv")
    assert [row.tolist() for row in dataset.positives(25.0)] == [[2], []]
    assert "for 1 of 2 queries, all correct photos are also queries" in caplog.text


def test_nothing_left_of_the_database(places, listed):
    with pytest.raises(ValueError, match=f"every photo in {places}/known is also a query, in {places}/known; "):
        listed(queries="known")
    (places / "asked" / "more.png").symlink_to(places / "known" / "@0@0@known@.png")
    for n in (1000, 2000):
        (places / f"known/@{n}@0@known@.png").write_bytes(b"")
    with pytest.raises(ValueError, match=f"every photo in {places}/known that can be read is also a query"):
        listed(skip_unreadable=True)


@pytest.fixture
def town(places):
    """The same as a dataset: its folder."""
    for side, source in (("database", "known"), ("queries", "asked")):
        shutil.copytree(places / source, places / "data/town/images/test" / side)
    return places / "data/town/images/test"


def test_a_dataset_keeps_queries_among_its_database(town, listed, caplog):
    (town / "database" / "@9000@0@.png").symlink_to(next((town / "queries").iterdir()))
    assert len(listed(dataset="town").database_paths) == 4
    assert f"1 of the 4 photos in {town}/database are also queries: they find themselves, and stay" in caplog.text


def test_unreadable_photos_of_datasets_and_positives(town, places, listed):
    """Left out of datasets too when asked, and indices still count all that the folder holds."""
    (town / "database/@0@0@known@.png").write_bytes(b"no photo")
    (places / "right.csv").write_text("query,database\n0,0\n1,1\n")
    dataset = listed(dataset="town", skip_unreadable=True, positives_file=places / "right.csv")
    assert len(dataset.database_paths) == 2 and [row.tolist() for row in dataset.positives(25.0)] == [[], [0]]


def test_unreadable_photos_are_left_out_when_asked(places, evaluated, listed, capsys):
    bad, empty = places / "known" / "@1000@0@known@.png", places / "asked" / "@5@5@.webp"
    bad.write_bytes(bad.read_bytes()[:200])
    empty.touch()
    folders = f"--database_folder={places}/known", f"--queries_folder={places}/asked", "--recall_values=1"
    line = refusal(capsys, lambda: evaluated(*folders))
    assert "cannot read the image" in line and "with --skip_unreadable" in line
    folder = evaluated(*folders, "--skip_unreadable")
    shown = capsys.readouterr().err
    assert f"1 of 3 photos in {places}/known cannot be read and are left out: {bad}" in shown
    assert f"1 of 3 photos in {places}/asked cannot be read and are left out: {empty}" in shown
    assert "(2 database, 2 queries): R@1: 50.0" in shown
    assert "cannot read the image" in (folder / "debug.log").read_text()
    for path in (places / "asked").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"none of the 3 photos in {places}/asked can be read"):
        listed(skip_unreadable=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no photo", "cannot identify"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", ""),  # only the beginning of a JPEG
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
    for read in (open_image, read_pixels, partial(read_pixels, upright=True)):
        with pytest.raises(ValueError, match=f"{path} .*{said}.*--skip_unreadable"):
            read(path)
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
    folders = f"--database_folder={places}/known", f"--queries_folder={places}/asked"
    assert results_of(evaluated(*folders, "--save_predictions=1", "--num_workers=2"))["recalls"]


def test_check_of_plain_folders(places, photo, capsys):
    assert check([f"{places}/known", "--workers", "1"]) == 0
    capsys.readouterr()
    (places / "known" / "a.heic").touch()
    (places / "known" / "notes.txt").touch()
    (places / "asked" / "bad.jpg").write_bytes(b"no photo")
    (places / "asked" / "linked.png").symlink_to(places / "known" / "@0@0@known@.png")
    assert check([f"{places}/known", f"{places}/asked", "--workers", "1"]) == 1
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
    assert f"photos also in {places}/known: 1;" in lines[4]


def test_check_of_the_same_folder_twice(places, capsys, monkeypatch):
    monkeypatch.chdir(places)
    (places / "link").symlink_to("known")
    again = ["./known/", "link", f"{places}/asked/../known"]
    assert check(["known", *again, "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the same folder as known: checked once\n") == 3 and shown.endswith("no fault in 3 images\n")


def test_check_of_a_dataset_tells_what_is_left_out(town, capsys):
    for name in ("database/._@0@0@.png", "database/list.mat", "queries/@0@0@.webp"):
        (town / name).touch()
    assert check([str(town.parents[1]), "--workers", "1"]) == 1
    shown = capsys.readouterr().out
    assert "database: 1 file (1 .mat) skipped" in shown and "queries: 1 file (1 .webp) not read; convert" in shown
    assert "3 faults in 5 images, 1 note" in shown  # two are copies


@pytest.mark.parametrize(("exact", "strays", "warned"), [(9, 1, True), (8, 1, False), (20, 2, True), (20, 3, False)])
@pytest.mark.parametrize("stray", [(0, 500000), (500000, 4e6), (-179.5, 179.5)])
def test_a_stray_position_hides_no_degrees(exact, strays, warned, stray):
    degrees = [(48.85 + n, -2.35 * n) for n in range(exact)]
    for order in (1, -1):
        positions = np.array([*degrees, *[stray] * strays, (np.nan, np.nan)])[:, ::order]
        assert like_degrees(positions) == warned
    for metres in ((12, 80), (181.5, 0.5)):  # whole numbers, and beyond 180
        assert not like_degrees(np.array([*[metres] * exact, *[stray] * strays], dtype=float))


def test_degrees_in_names_are_told_where_they_are_only_shown(places, listed, caplog):
    for n, path in enumerate(sorted((places / "known").iterdir())):
        path.rename(path.with_name(f"@48.{n}@2.{n}@.png"))
    listed(labelled=False).located(exif=True)
    assert caplog.text.count("the positions of the database images look like degrees (nearly all within 90") == 1
    assert "the positions of the queries look" not in caplog.text


def test_a_missing_folder_is_told_by_its_first_missing_part(tmp_path):
    for name in ("gsv_cities", "toy_city", ".hidden"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no folder toycity, only gsv_cities, toy_city; check "):
        list_images(tmp_path / "toycity/images/test/database")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/toy_city has no folder images; check "):
        list_images(tmp_path / "toy_city/images/test/database")
