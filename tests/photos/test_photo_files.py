"""Which files count as photos, and what is said of the others."""

import csv
import json
import logging
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from datasets.check import main as check
from datasets.evaluation.database_queries import DatabaseQueries, like_degrees
from datasets.photos.listing import PHOTO_SUFFIXES, list_images, scan
from datasets.training.gsv_cities import find_cities
from model import build_model


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
def evaluated(tmp_path, capsys):
    """Evaluates `known` and `asked`; returns what the terminal showed and the run's folder."""
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny").state_dict(), tmp_path / "weights.pth")

    def run(*flags, database="known", queries="asked", status=None):
        save_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        argv = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56 --recall_values 1".split()
        argv += [f"--resume={tmp_path}/weights.pth", f"--save_dir={save_dir}", *flags]
        if database is not None:
            argv += [f"--database_folder={tmp_path}/{database}", f"--queries_folder={tmp_path}/{queries}"]
        if status is None:
            eval_script.main(argv)
            (folder,) = save_dir.iterdir()
            return capsys.readouterr().err, folder
        with pytest.raises(SystemExit) as stop:
            eval_script.main(argv)
        assert stop.value.code == status and not save_dir.exists()
        return [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line or "error:" in line]

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
        ({"b/up": "."}, ["b/2.jpg", "c/3.jpg"], 1),
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

    class Reversed:
        def __init__(self, *folder):
            self.entries = iter(list(real(*folder))[::-1])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
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
    with open(folder / "predictions.csv", newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    assert len(first) == len(kinds)
    assert all(row["query"].lower()[-6:] == row["database"][-6:] for row in first if "gif" not in row["query"].lower())
    (line,) = [line for line in shown.splitlines() if "left out" in line]
    assert f"{tmp_path}/asked: left out 1 file (1 .mp4); convert photos to JPEG" in line

    for side in ("database", "queries"):
        photo(f"data/town/images/test/{side}/@0@0@.jpg")
        photo(f"data/town/images/test/{side}/@0@0@.webp")
    shown, folder = evaluated(f"--eval_datasets_folder={tmp_path}/data", "--eval_dataset_name=town", database=None)
    assert "Recalls on town test (1 database, 1 queries)" in shown
    assert shown.count("left out 1 file (1 .webp); in datasets only .jpg, .jpeg and .png count") == 2


def test_grey_photos_of_16_bits_are_told_apart(tmp_path, evaluated):
    """Four greys, all of which are white above 255."""
    for side in ("known", "asked"):
        (tmp_path / side).mkdir()
        for n, grey in enumerate((3000, 20_000, 40_000, 60_000)):
            ramp = grey + np.arange(48 * 48, dtype=np.uint16).reshape(48, 48)
            image = Image.fromarray(ramp if side == "known" else (ramp // 256).astype(np.uint8))
            image.save(tmp_path / side / f"{n}.png")
    (tmp_path / "right.csv").write_text("".join(f"{n}.png,{n}.png\n" for n in range(4)))
    shown, _ = evaluated(f"--positives_file={tmp_path}/right.csv")
    assert "(4 database, 4 queries): R@1: 100.0" in shown
    assert "asked in known database: 4 images read by the upper 8 of more bits per channel, e.g. " in shown


def test_pipes_and_devices_are_no_photos(tmp_path, photo, caplog, capsys):
    photo("a.jpg")
    photo("away.jpg").rename(tmp_path / "away")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.png").symlink_to("b.jpg")
    (tmp_path / "d.jpg").symlink_to(os.devnull)
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub" / "notes")
    os.mkfifo(tmp_path / ".hidden.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.open(tmp_path, os.O_RDONLY)  # a socket's whole path must be short
        server.bind(f"/proc/self/fd/{directory}/e.jpg")
        os.close(directory)
    (tmp_path / "linked.jpg").symlink_to("away")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert below(tmp_path, list_images(tmp_path)) == ["a.jpg", "broken.jpg", "linked.jpg", "loop.jpg"]
    (line,) = caplog.messages
    assert f"{tmp_path}: left out 6 files (5 pipe, socket or device, 1 without suffix)" in line
    for name in ("broken.jpg", "loop.jpg"):
        (tmp_path / name).unlink()
    check([str(tmp_path), "--workers", "1"])
    assert "6 files (5 pipe, socket or device, 1 without suffix) skipped" in capsys.readouterr().out


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
    with open(folder / "predictions.csv", newline="") as file:
        assert not any("asked" in row["database"] for row in csv.DictReader(file))


def test_nothing_left_of_the_database(places, evaluated):
    (places / "all").mkdir()
    (places / "all" / "known").symlink_to(places / "known")
    for queries in ("known", "all"):
        (line,) = evaluated(queries=queries, status=2)
        assert f"every photo in {places}/known is also a query, in {places / queries}; name a --database_folder" in line
    (places / "asked" / "more.png").symlink_to(places / "known" / "@0@0@known@.png")
    for n in (1000, 2000):
        (places / f"known/@{n}@0@known@.png").write_bytes(b"")
    (line,) = evaluated("--skip_unreadable", status=2)
    assert f"every photo in {places}/known that can be read is also a query" in line


def test_a_dataset_keeps_queries_among_its_database(places, evaluated):
    for side, source in (("database", "known"), ("queries", "asked")):
        shutil.copytree(places / source, places / "data/town/images/test" / side)
    images = places / "data/town/images/test"
    (images / "database" / "@9000@0@.png").symlink_to(next((images / "queries").iterdir()))
    shown, folder = evaluated(f"--eval_datasets_folder={places}/data", "--eval_dataset_name=town", database=None)
    assert f"1 of the 4 photos in {images}/database are also queries: they find themselves, and stay" in shown
    assert json.loads((folder / "results.json").read_text())["dataset"]["database"] == 4


def test_unreadable_photos_are_left_out_when_asked(places, evaluated):
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
    (line,) = evaluated("--skip_unreadable", status=2)
    assert f"none of the 3 photos in {places}/asked can be read" in line


def test_unreadable_photos_of_datasets_and_positives(places, evaluated):
    """Left out of datasets too when asked, and indices still count all that the folder holds."""
    for side, source in (("database", "known"), ("queries", "asked")):
        shutil.copytree(places / source, places / "data/town/images/test" / side)
    (places / "data/town/images/test/database/@0@0@known@.png").write_bytes(b"no photo")
    (places / "right.csv").write_text("query,database\n0,0\n1,1\n")
    flags = [f"--eval_datasets_folder={places}/data", "--eval_dataset_name=town", "--skip_unreadable"]
    shown, _ = evaluated(*flags, f"--positives_file={places}/right.csv", database=None)
    assert "1 of 3 photos in" in shown and "(2 database, 2 queries): R@1: 50.0" in shown


def test_an_unreadable_photo_ends_a_run_that_did_not_ask(places, evaluated, tmp_path, capsys):
    (places / "asked" / "@5@5@.png").write_bytes(b"no photo")
    with pytest.raises(SystemExit) as stop:
        evaluated()
    assert stop.value.code == 2
    assert "cannot read the image" in (shown := capsys.readouterr().err) and "with --skip_unreadable" in shown


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
    assert capsys.readouterr().out.splitlines() == [
        f"{places}/known, 3 photos",
        f"{places}/asked, 4 photos",
        f"left-out: {places}/known: 1 file (1 .heic) not read; convert them to JPEG or PNG, or remove them",
        f"left-out: {places}/known: 1 file (1 .txt) skipped",
        f"shared: {places}/asked: photos also in {places}/known: 1; as queries they are left out of the database",
        f"duplicate: {places}/asked/@0@0@asked@.png: the same picture as {places}/known/@0@0@known@.png; remove one of "
        "them",
        f"duplicate: {places}/asked/@1000@0@asked@.png: the same picture as {places}/known/@1000@0@known@.png; remove "
        "one of them",
        f"unreadable: {places}/asked/bad.jpg: cannot identify image file '{places}/asked/bad.jpg'; replace or remove "
        "it",
        *(
            f"no-position: {places}/{side}: no photo has a position: not all have one in their names, none in EXIF data"
            "; use --no_labels"
            for side in ("known", "asked")
        ),
        "7 faults in 7 images, 1 note",
    ]


def test_check_of_one_folder_in_another_counts_copies_once(places, capsys):
    shutil.move(places / "asked", places / "known" / "asked")
    known, asked = places / "known", places / "known" / "asked"
    (asked / "linked.png").symlink_to(known / "@2000@0@known@.png")
    for folders, both in (((known, asked), 3), ((asked, known), 4)):  # the link, and what it leads to
        assert check([*map(str, folders), "--workers", "1"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert not any(line.startswith("duplicate") for line in lines)
        (line,) = [line for line in lines if line.startswith("shared")]
        assert f"photos also in {folders[0]}: {both} (2 the same picture as one outside); as" in line
    # Copies on one side of the two are told as ever.
    shutil.copy(known / "@0@0@known@.png", known / "@7@7@.png")
    shutil.copy(asked / "@0@0@asked@.png", asked / "@8@8@.png")
    check([str(known), str(asked), "--workers", "1"])
    shown = capsys.readouterr().out
    assert f"duplicate: {known}/@7@7@.png: the same picture as {known}/@0@0@known@.png;" in shown
    assert f"duplicate: {asked}/@8@8@.png: the same picture as {asked}/@0@0@asked@.png;" in shown
    assert shown.count("duplicate") == 2


def test_check_of_the_same_folder_twice(places, capsys, monkeypatch):
    monkeypatch.chdir(places)
    (places / "link").symlink_to("known")
    shutil.copytree("known", "town/images/test/database")
    shutil.copytree("asked", "town/images/test/queries")
    for path in (places / "town/images/test/queries").iterdir():
        Image.new("L", (8, 8), len(path.name)).save(path.with_name(f"@0@{len(path.name)}@.png"))
        path.unlink()
    assert check(["known", "./known/", "link", f"{places}/asked/../known", "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "known, the same folder as known: checked once",
        "link, the same folder as known: checked once",
        f"{places}/asked/../known, the same folder as known: checked once",
        "known, 3 photos",
        "no fault in 3 images",
    ]
    assert check(["town", "town", "--workers", "1"]) == 0
    assert "no fault in 5 images" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("east", "north", "warned"),
    [
        ("48.85", "2.35", True),
        ("-151.2", "-33.8", True),
        ("12.5", "80", True),
        ("181.5", "0.5", False),
        ("12", "80", False),
    ],
)
def test_degrees_in_names_are_told(tmp_path, caplog, east, north, warned):
    caplog.set_level(logging.WARNING)
    for side, name in (("database", f"@{east}@{north}@.jpg"), ("queries", "@500000@4000000@.jpg")):
        path = tmp_path / "town/images/test" / side / name
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8), len(side)).save(path)
    DatabaseQueries.from_folder(tmp_path, "town", "test")
    assert ("the positions of the database images look like degrees" in caplog.text) == warned
    assert "the positions of the queries look" not in caplog.text


@pytest.mark.parametrize(("exact", "strays", "warned"), [(9, 1, True), (8, 1, False), (20, 2, True), (20, 3, False)])
@pytest.mark.parametrize("stray", [(0, 500000), (500000, 4e6), (-179.5, 179.5)])
def test_a_stray_position_hides_no_degrees(exact, strays, warned, stray):
    degrees = [(48.85 + n, 2.35 * n) for n in range(exact)]
    for order in (1, -1):
        positions = np.array([*degrees, *[stray] * strays, (np.nan, np.nan)])[:, ::order]
        assert like_degrees(positions) == warned
    whole = np.array([*([(12, 80)] * exact), *[stray] * strays], dtype=float)
    assert not like_degrees(whole)


def test_degrees_in_names_are_told_where_they_are_only_shown(places, evaluated):
    for n, path in enumerate(sorted((places / "known").iterdir())):
        path.rename(path.with_name(f"@48.{n}@2.{n}@.png"))
    (places / "right.csv").write_text("0,0\n1,1\n")
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
    for number in range(5):
        (tmp_path / f"city{number}").mkdir()
    with pytest.raises(FileNotFoundError, match="only city0, city1, city2, city3, city4, ...; check "):
        list_images(tmp_path / "none")
