"""What `python -m datasets.check` finds, on trees with faults planted by hand."""

import os
import shutil

import pytest
from helpers import refusal
from PIL import Image

from datasets import faults as checks
from datasets.check import main
from datasets.faults import Fault

HEADER = "place_id,year,month,northdeg,city_id,lat,lon,panoid\n"


@pytest.fixture
def copy(city, tmp_path):
    """The toy city's two folders, free to be spoilt."""
    shutil.copytree(city, tmp_path / "data")
    return tmp_path / "data"


def photo(path, shade):
    """Writes a small grey photo; shades a JPEG keeps apart, from 0 to 255, make different photos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (40, 30), shade).save(path)
    return path


def clean_tree(folder, split="test"):
    """One database image at the origin, one query 25 metres from it."""
    photo(folder / "images" / split / "database" / "@0@0@.jpg", 10)
    photo(folder / "images" / split / "queries" / "@15@20@.jpg", 20)
    return folder


def table(folder, city, rows):
    (folder / "Dataframes").mkdir(parents=True, exist_ok=True)
    (folder / "Dataframes" / f"{city}.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def check_tree(folder, workers=1):
    return checks.check_tree(folder, threshold=25.0, workers=workers)[1]


def check_gsv_cities(folder, workers=1):
    return checks.check_gsv_cities(folder, workers=workers)[1]


def found(faults):
    """Kind and path of each fault."""
    return [(fault.kind, fault.path) for fault in faults]


def test_the_clean_city_has_no_fault(city, capsys):
    assert main([str(city / "toy_city"), str(city / "gsv_cities"), "--workers", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{city}/toy_city, train: 10 database, 10 queries",
        f"{city}/toy_city, val: 10 database, 10 queries",
        f"{city}/toy_city, test: 15 database, 15 queries",
        f"{city}/gsv_cities, Boston: 8 places, 40 images",
        f"{city}/gsv_cities, London: 8 places, 40 images",
        f"{city}/gsv_cities, in all: 16 places, 80 images",
        "no fault in 150 images",
    ]


def plant(data):
    """Plants twelve faults in the toy city, no two alike.

    Returns:
        Kind, path and a piece of the message of each, in the order they are to be reported.
    """
    train, val, test = (data / "toy_city/images" / split for split in ("train", "val", "test"))
    shutil.rmtree(train / "queries")
    for path in (val / "database").iterdir():
        path.unlink()
    database, queries = sorted((test / "database").iterdir()), sorted((test / "queries").iterdir())
    nameless = database[0].rename(database[0].with_name("photo.jpg"))
    again = shutil.copy(database[2], database[2].with_name(database[2].name.replace("@.jpg", "again@.jpg")))
    leaked = test / "queries" / database[3].name
    leaked.symlink_to(database[3])
    far = photo(test / "queries" / "@499000@3000@.jpg", 10)
    queries[4].write_bytes(b"")
    truncate(queries[6])

    in_queries = [
        ("duplicate", leaked, f"the same picture as {database[3]};"),
        ("zero-size", queries[4], "the file is empty"),
        ("unreadable", queries[6], "truncated"),
    ]
    gsv = data / "gsv_cities"
    boston = gsv / "Dataframes/Boston.csv"
    lines = boston.read_text().splitlines(keepends=True)
    boston.write_text("".join(lines + lines[8:9]))
    london = gsv / "Dataframes/London.csv"
    london.write_text(london.read_text().replace("London", "London,", 1))
    missing = sorted((gsv / "Images/Boston").iterdir())[5]
    missing.unlink()
    unnamed = photo(gsv / "Images/Boston/holiday.JPG", 30)
    return [
        ("missing", train / "queries", "no such folder"),
        ("empty", val / "database", "no image in it"),
        ("name", nameless, "no finite UTM coordinates"),
        ("no-positive", far, "no database image within 25 m"),
        ("duplicate", again, f"the same picture as {database[2]};"),
        *sorted(in_queries, key=lambda fault: fault[1]),
        ("repeated-row", boston, "row 41 below the header names Boston/Boston_00000"),
        ("table", london, "line 2: "),
        ("missing", missing, "a row names it"),
        ("unnamed", unnamed, "no row names it"),
    ]


def test_twelve_planted_faults_and_no_other(copy, capsys):
    planted = plant(copy)
    assert len(planted) == 12
    assert main([str(copy / "toy_city"), str(copy / "gsv_cities"), "--workers", "2"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if not line.startswith(str(copy))]  # the totals
    for line, (kind, path, message) in zip(lines, planted, strict=True):
        assert line.startswith(f"{kind}: {path}: ") and message in line
    # 10 in train, 10 in val, 33 in test, 41 rows in Boston.
    assert last == "12 faults in 94 images"


def test_results_do_not_depend_on_the_workers(copy):
    plant(copy)
    for check, folder in (check_tree, copy / "toy_city"), (check_gsv_cities, copy / "gsv_cities"):
        faults = check(folder)
        assert faults and faults == check(folder, workers=2)


def test_a_positive_lies_within_a_closed_ball(tmp_path, capsys):
    clean_tree(tmp_path)
    assert main([str(tmp_path), "--workers", "1"]) == 0
    assert main([str(tmp_path), "--workers", "1", "--threshold", "24.9"]) == 1
    path = tmp_path / "images/test/queries/@15@20@.jpg"
    assert f"no-positive: {path}: no database image within 24.9 m" in capsys.readouterr().out


def test_names_without_finite_coordinates(tmp_path):
    names = ["@1@-inf@.jpg", "@1@.jpg", "@1e999@2@.jpg", "@nan@2@.jpg", "@x@2@.JPEG", "photo.png"]
    folders = [clean_tree(tmp_path) / "images/test" / part for part in ("database", "queries")]
    paths = [folder / name for folder in folders for name in names]
    for shade, path in enumerate(paths, 3):
        photo(path, 10 * shade)
    far = photo(folders[1] / "@900@0@.jpg", 0)
    expected = [*(("name", str(path)) for path in paths), ("no-positive", str(far))]
    assert found(check_tree(tmp_path)) == expected


def test_several_zones_are_noted(tmp_path, capsys):
    """The same numbers in two zones of both hemispheres; letters of one hemisphere are one map."""
    for shade, (part, zone) in enumerate((("database", "32@T"), ("database", "32@U"), ("queries", "33@H"))):
        photo(tmp_path / f"images/test/{part}/@1@{shade}@{zone}@.jpg", 40 * shade)
    assert main([str(tmp_path), "--workers", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("zones: ")]
    assert f"{tmp_path}/images/test: " in line and "UTM zones 32 and 33 and both hemispheres" in line
    (tmp_path / "images/test/queries/@1@2@33@H@.jpg").rename(tmp_path / "images/test/queries/@1@2@32@U@.jpg")
    assert main([str(tmp_path), "--workers", "1"]) == 0 and "\nzones: " not in capsys.readouterr().out


def test_files_that_cannot_be_read_have_one_fault_each(tmp_path):
    database = clean_tree(tmp_path) / "images/test/database"
    for name in ("@1@1@.jpg", "@1@2@.jpg"):
        (database / name).touch()
    for name in ("@2@1@.jpg", "@2@2@.jpg"):
        (database / name).write_bytes(b"not a photo")
    (database / "@3@3@.jpg").symlink_to("nowhere.jpg")
    noise = Image.effect_noise((64, 64), 50)
    noise.save(database / "@4@4@.png")
    truncate(database / "@4@4@.png")
    (database / "@5@5@.jpg").symlink_to("@5@5@.jpg")
    faults = check_tree(tmp_path, workers=2)
    kinds = ["zero-size"] * 2 + ["unreadable"] * 5
    assert found(faults) == [*zip(kinds, sorted(map(str, database.glob("@[1-5]*"))), strict=True)]
    assert "a link to nowhere.jpg, which is not there" in faults[4].message
    assert "Too many levels of symbolic links" in faults[6].message


def test_each_duplicate_names_the_first(tmp_path):
    images = clean_tree(tmp_path) / "images"
    first = images / "test/database/@0@0@.jpg"
    linked = images / "test/database/@1@0@.jpg"
    linked.symlink_to(first)
    copied = shutil.copy(first, images / "test/queries/@0@1@.jpg")
    clean_tree(tmp_path, "val")  # the same pictures, but in another split
    faults = check_tree(tmp_path)
    assert found(faults) == [("duplicate", str(linked)), ("duplicate", str(copied))]
    assert all(f"the same picture as {first};" in fault.message for fault in faults)


def test_linked_folders_are_followed(tmp_path, capsys):
    away = clean_tree(tmp_path / "away")
    far = photo(away / "images/test/queries/sub/@900@900@.jpg", 30)
    os.renames(away / "images/test/queries/sub", tmp_path / "sub")
    (away / "images/test/queries/sub").symlink_to(tmp_path / "sub")
    tree = tmp_path / "tree"
    (tree / "images").mkdir(parents=True)
    (tree / "images/val").symlink_to(away / "images/test")
    (tree / "images/test").symlink_to("val")
    assert main([str(tree), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tree}, val = test: 1 database, 2 queries"
    assert lines[1].startswith(f"no-positive: {tree}/images/val/queries/sub/{far.name}: ")
    assert lines[2:] == ["1 fault in 3 images"]


def test_missing_parts_of_a_split(tmp_path):
    images = clean_tree(tmp_path) / "images"
    (images / "val").mkdir()
    (images / "train").symlink_to("nowhere")
    (images / "val/database").symlink_to("nowhere")
    missing = [images / split / part for split in ("train", "val") for part in ("database", "queries")]
    assert found(check_tree(tmp_path)) == [("missing", str(folder)) for folder in missing]


def test_broken_tables(copy):
    row = "7,2012,6,45,London,51.5,-0.12,a\n"
    rows = {"A": "", "B": HEADER, "C": HEADER + row.replace("6", "x"), "London": HEADER + row.replace("7", "100000")}
    paths = [copy / "gsv_cities/Dataframes" / f"{city}.csv" for city in rows]
    for path in paths:
        path.write_text(rows[path.stem])
    paths.append(paths[0].with_stem("Nowhere"))
    paths[-1].symlink_to("nowhere.csv")
    faults = check_gsv_cities(copy / "gsv_cities")
    assert found(faults) == [("table", str(path)) for path in paths]
    for fault in faults[:-1]:
        assert fault.path not in fault.message and fault.message.endswith("its images were left out")
    assert "'x'; a table has" in faults[2].message and "place_id outside 0 to 99999" in faults[3].message


def test_gsv_cities_images_that_cannot_be_read_and_rows_of_another_table(copy):
    gsv = copy / "gsv_cities"
    paths = sorted((gsv / "Images/London").iterdir())
    paths[2].write_bytes(b"")
    truncate(paths[7])
    paths[9].unlink()
    paths[9].symlink_to("nowhere.jpg")
    row = (gsv / "Dataframes/London.csv").read_text().splitlines()[1]
    table(gsv, "Paris", [row])
    repeated, *faults = check_gsv_cities(gsv, workers=2)
    assert found([repeated]) == [("repeated-row", str(gsv / "Dataframes/Paris.csv"))]
    assert repeated.message.startswith("row 1 below the header names London/London_0000000_")
    kinds = ("zero-size", "unreadable", "unreadable")
    assert found(sorted(faults, key=lambda fault: fault.path)) == [
        (kind, str(path)) for kind, path in zip(kinds, (paths[2], paths[7], paths[9]), strict=True)
    ]


def test_a_whole_city_is_one_fault_and_so_are_no_tables(copy, tmp_path, capsys):
    gsv = copy / "gsv_cities"
    (gsv / "Images/London").rename(gsv / "Images/Londinium")
    missing, unnamed = check_gsv_cities(gsv)
    assert (missing.kind, missing.path) == ("missing", str(gsv / "Images/London")) and "40 rows" in missing.message
    assert (unnamed.kind, unnamed.path) == ("unnamed", str(gsv / "Images/Londinium"))
    assert "40 images" in unnamed.message
    (tmp_path / "none" / "Dataframes").mkdir(parents=True)
    assert main([f"{tmp_path}/none"]) == 1
    assert f"missing: {tmp_path}/none/Dataframes: no <City>.csv in it" in capsys.readouterr().out


def test_unrecognised_folders(city, tmp_path, capsys):
    (tmp_path / "images/train").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "nowhere", city, city / "toy_city/images"):
        line = refusal(capsys, lambda folder=folder: main([str(city / "toy_city"), str(folder)]))
        assert f"{folder} is neither an evaluation dataset" in line and "name the folder that holds images" in line


@pytest.mark.parametrize("flag", ["--threshold=-1", "--threshold=nan", "--workers=0"])
def test_refused_numbers(city, flag, capsys):
    assert flag.replace("=", ": ") in refusal(capsys, lambda: main([str(city / "toy_city"), flag]))


def test_a_fault_is_one_printable_line():
    fault = Fault("name", "b\nad/" + os.fsdecode(b"caf\xe9 \xc3\xa9.jpg"), "why")
    assert str(fault) == r"name: b\nad/caf\udce9 é.jpg: why"
