"""Files that say which database images are correct: every form, every order, and nothing that is not one of them."""

import io
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from datasets.evaluation.database_queries import DatabaseQueries
from datasets.evaluation.positives import natural_order, read_positives
from model import build_model

DATABASE = [f"db/{n:02d}.jpg" for n in range(5)]
QUERIES = [f"asked/{n:02d}.jpg" for n in range(3)]
RIGHT = [[0, 2], [4], []]


def objects(rows):
    array = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        array[index] = row
    return array


def headed(rows, order=None):
    """As in VPR-Bench: the query's index before its list."""
    array = np.empty((len(rows), 2), dtype=object)
    for line, query in enumerate(order or range(len(rows))):
        array[line, 0], array[line, 1] = query, rows[query]
    return array


def pickled(array, protocol):
    """A .npy file as other versions of NumPy and Python write it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    pickle.dump(array, file, protocol=protocol)
    return file.getvalue()


def lists(positives):
    return [row.tolist() for row in positives]


@pytest.fixture
def read(tmp_path):
    """Reads an array, text or bytes as a positives file of three queries and five database images."""

    def run(content, name=None, database=DATABASE, queries=QUERIES, folders=None):
        path = tmp_path / (name or ("p.npy" if isinstance(content, (np.ndarray, bytes)) else "p.csv"))
        if isinstance(content, np.ndarray):
            with open(path, "wb") as file:
                np.save(file, content, allow_pickle=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return lists(read_positives(path, database, queries, folders))

    return run


MATRIX = np.zeros((3, 5), dtype=np.int64)
MATRIX[[0, 0, 1], [0, 2, 4]] = 1


@pytest.mark.parametrize(
    "array",
    [
        np.array([[2, 0], [4, -1], [-1, -1]], dtype=np.int16),
        np.array([[2.0, 0.0], [4.0, np.nan], [-1.0, np.nan]]),
        np.asfortranarray(np.array([[2, 0], [4, -1], [-1, -1]], dtype=">i4")),
        MATRIX,
        MATRIX.astype(bool),
        MATRIX.astype(float),
        np.asfortranarray(MATRIX.astype(np.uint8)),
        objects(RIGHT),
        objects([tuple(row) for row in RIGHT]),
        objects([np.array(row, dtype=np.int32) for row in RIGHT]),
        objects([np.array(row, dtype=">u2")[None] for row in RIGHT]),
        objects([[np.int64(image) for image in row] for row in RIGHT]),
        objects([row.tolist() for row in MATRIX.astype(bool)]),
        objects(list(MATRIX)),
        objects(RIGHT)[:, None],
        headed(RIGHT),
        headed(RIGHT, order=[2, 0, 1]),
        headed([np.array(row) for row in RIGHT]),
        objects([[n, row] for n, row in enumerate(RIGHT)]),
        headed([RIGHT[0], 4, []]),  # a bare number beside lists
    ],
)
def test_every_form_of_an_array_says_the_same(read, array):
    assert read(array) == RIGHT
    if array.dtype == object:
        for protocol in (2, 3, 4):
            assert read(pickled(array, protocol)) == RIGHT


def test_an_array_of_python_2(read):
    """Whose texts and bytes are of one kind: lists, an array and a number of NumPy's."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    kind = lambda name, order: (  # noqa: E731
        b"cnumpy\ndtype\n"
        + text(name)
        + b"K\x00K\x01\x87R(K\x03"
        + text(order)
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01K"
    number = b"cnumpy.core.multiarray\nscalar\n" + kind(b"i8", b"<") + text((2).to_bytes(8, "little")) + b"\x86R"
    row = array + b"\x01\x85" + kind(b"i4", b">") + b"\x89" + text(b"\0\0\0\x04") + b"tb"
    whole = array + b"\x03\x85" + kind(b"O8", b"|") + b"\x89](](K\x00" + number + b"e" + row + b"]etb"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    assert read(header.getvalue() + b"\x80\x02" + whole + b".") == RIGHT


def test_one_image_a_query(read):
    assert read(np.array([3, 0, 4])) == [[3], [0], [4]]
    assert read(objects([3, 0, 4])) == [[3], [0], [4]]


@pytest.mark.parametrize(
    "text",
    [
        "query,database\n0,0\n0,2\n1,4\n",
        "0,0\n0,2\n1,4\n0,2",
        "00.jpg,00.jpg\n00.jpg,02.jpg\n01.jpg,4\n",
        "query;database\r\n0;0\r\n0;2\r\n1;4\r\n\r\n;\r\n",
        "query\tdatabase\n0\t0\n0\t2\n1\t4\n\n\n",
        '\ufeffquery,database\n"0","00.jpg"\n 0 , 2 \n1,4\n',
        "reference,query\n0,0\n2,0\n4,1\n",
        "asked/00.jpg,db/00.jpg\n./00.jpg,./db/02.jpg\n01.jpg,04.jpg\n",
    ],
)
@pytest.mark.parametrize("name", ["p.csv", "X.CSV", "p.tsv"])
def test_every_form_of_text_says_the_same(read, text, name):
    assert read(text, name) == RIGHT


@pytest.mark.parametrize(
    ("header", "database_first"),
    [
        ("database,image", True),
        ("db,query", True),
        ("ref,photo", True),
        ("dbImage,photo", True),
        ("map_image,asked", True),
        ("Database Image,Asked", True),
        ("gallery,probe", True),
        ("photo,q", True),
        ("query,database", False),
        ("q,d", False),
        ("asked,reference", False),
        ("query_ref,ref", False),
        ("query,query_match", False),
        ("mapillary_id,image", False),
        ("one,two", False),
    ],
)
def test_a_header_says_which_column_is_which(read, caplog, header, database_first):
    caplog.set_level(logging.INFO)
    assert read(f"{header}\n1,2\n") == ([[], [], [1]] if database_first else [[], [2], []])
    first, second = ("database image", "query") if database_first else ("query", "database image")
    (line,) = caplog.messages
    assert line.endswith(
        f"p.csv: its first row, {header!r}, is a header; column 1 is the {first}, column 2 the {second}"
    )


def test_a_file_without_header_has_queries_first(read, caplog):
    caplog.set_level(logging.INFO)
    assert read("1,2\n") == [[], [2], []]
    (line,) = caplog.messages
    assert line.endswith(
        "p.csv: it has no header: its first row, '1,2', is a pair; column 1 is the query, column 2 the database image"
    )


def test_names_that_come_twice_want_their_folder(read):
    database = ["db/a/0.jpg", "db/b/0.jpg", "db/c/a/0.jpg"]
    folders = ("db", "q")
    for name, image in (
        ("a/0.jpg", 0),
        ("db/a/0.jpg", 0),
        ("b/0.jpg", 1),
        ("c/a/0.jpg", 2),
        (os.path.abspath("db/b/0.jpg"), 1),
    ):
        assert read(f"q.jpg,{name}\n", database=database, queries=["q/q.jpg"], folders=folders) == [[image]]
    with pytest.raises(ValueError, match=r"p.csv, line 2: 3 photos are named '0.jpg', e.g. db/a/0.jpg and db/b/0.jpg"):
        read("q,d\nq.jpg,0.jpg\n", database=database, queries=["q/q.jpg"], folders=folders)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "p.csv has no correct image"),
        ("query,database\n", "p.csv has no correct image"),
        ("\n\n", "p.csv has no correct image"),
        ("q,d\n0,5\n", "line 2 names database image 5, but there are 5, counted from 0"),
        ("3,0\n", "line 1 names query 3, but there are 3"),
        (f"0,{'9' * 5000}\n", "line 1 names database image 999999"),
        ("0,-1\n", "line 1: the row '0,-1' is not"),
        ("q,d\n0,1.5\n", "line 2: the row '0,1.5' is not"),
        ("no.jpg,nor.jpg\n", "line 1: the row 'no.jpg,nor.jpg' is not"),
        ("q,d\n\n0,²\n", "line 3: the row '0,²' is not"),
        ("db,ref\n0,1\n", "line 1: both columns of the header 'db,ref' name database images; name one `query`"),
        ("database,map_id\n0,1\n", "line 1: both columns of the header 'database,map_id' name"),
        ("0\n", "line 1: '0' has 1 column instead of 2"),
        (",query,database\n0,1,2\n", "line 1: ',query,database' has 3 columns"),
        ('0,1\n"0,2\n', "line 2: unexpected end of data"),
        (f"0,{'x' * 200_000}\n", "line 1: field larger"),
        ("0,1\n0,2\n".encode("utf-16"), "not a .npy file"),
    ],
)  # fmt: skip
def test_text_that_is_refused_names_its_line(read, content, message):
    with pytest.raises(ValueError) as error:
        read(content)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_text_of_another_encoding(read):
    with pytest.raises(ValueError, match=r"p.csv, line 1: not text in UTF-8, but perhaps UTF-16; save it as UTF-8"):
        read("0,1\n0,2\n".encode("utf-16"), "p.csv")
    with pytest.raises(ValueError, match=r"line 1: the row '0,caf\\udce9.jpg' is not"):
        read("0,café.jpg\n".encode("latin-1"), "p.csv")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 0), dtype=int), "holds no value"),
        (np.full((3, 2), -1), "has no correct image for any query"),
        (objects([[], [], []]), "has no correct image for any query"),
        (np.zeros((4, 1), dtype=int), "has 4 rows for 3 queries"),
        (MATRIX.T.astype(bool), "has 5 rows for 3 queries, like the transposed matrix"),
        (np.ones((3, 4), dtype=bool), "boolean matrix with 4 columns for 5 database images"),
        (np.ones((3, 4), dtype=int), "repeats indices within a row"),
        (255 * MATRIX // 255 * 3, "repeats indices within a row"),
        (np.array([[0.5], [1], [2]]), "row 0: 0.5 is not a whole number"),
        (np.array([[0], [1], [np.inf]]), "row 2: inf is not a whole number"),
        (np.array([[0], [1], [7]]), "row 2: it names database image 7, but there are 5"),
        (np.array([[0], [1], [2**64 - 1]], dtype=np.uint64), "row 2: it names database image"),
        (np.zeros((3, 5, 1), dtype=int), "shape (3, 5, 1)"),
        (np.zeros((), dtype=int), "shape ()"),
        (np.array(["a", "b", "c"]), "values of type '<U1'"),
        (np.array([1j, 2, 3]), "values of type '<c16'"),
        (np.zeros(3, dtype=[("q", int)]), "not a .npy file of one plain array"),
        (objects([[0], ["1"], [2]]), "row 1: it does not hold only numbers"),
        (objects([[0], None, [2]]), "row 1: not a list"),
        (objects([[0], np.zeros((2, 2), int), [2]]), "row 1: not a list"),
        (objects([[0], [2**80], [2]]), "row 1: an index is too large"),
        (objects([[0], [0, 1, 2, 3, 4, 0], [2]]), "row 1: a list of 6 for 5 database images"),
        (objects([[0], [True, False], [2]]), "booleans in rows of several lengths"),
        (objects([[0], np.array([True, False]), [2]]), "booleans in rows of several lengths"),
        (objects([[0, 1, 1], [0, 0], [1]]), "repeats 0 and 1 within rows"),
        (headed(RIGHT, order=[0, 1, 1]), "row 2: it starts with 1, but each query 0 to 2 must come once"),
        (objects([{"a": 1}, [0], [1]]), "instruction EMPTY_DICT, which no array of indices needs"),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(read, array, message):
    with pytest.raises(ValueError) as error:
        read(array)
    assert message in str(error.value) and "p.npy" in str(error.value) and "\n" not in str(error.value)


def test_indices_or_a_matrix_of_two_images_are_taken_only_where_both_say_the_same(read):
    two = DATABASE[:2]
    with pytest.raises(ValueError, match="could hold indices or a 0/1 matrix.* save it as booleans"):
        read(np.array([[0, 1], [1, 0], [0, 1]]), database=two)
    assert read(np.array([[False, True], [True, False], [False, True]]), database=two) == [[1], [0], [1]]
    assert read(np.array([[0, 1], [0, 0], [1, 1]]), database=two) == [[1], [], [0, 1]]  # no list repeats an index


@pytest.mark.parametrize(
    "pairs",
    [
        np.array([[0, 3], [1, 0], [2, 4]]),
        np.array([[0.0, 3.0], [1.0, np.nan], [2.0, 4.0]]),
        np.array([[2, 3], [0, 0], [1, 4]], dtype=np.uint8),
        np.array([[0, 0], [1, 1], [2, 4]]),
        headed([3, 0, 4]),
        headed([3, 0, 4], order=[2, 0, 1]),
        objects([[0, 3], (1, 0), np.array([2, 4])]),
    ],
)
def test_pairs_or_lists_of_two_images_are_refused(read, pairs):
    with pytest.raises(
        ValueError, match="could hold pairs `query, database image` or the indices of two.* 0 to 2, once"
    ):
        read(pairs)


def test_what_is_no_pairs_is_read_as_lists(read):
    """The own number among a query's images is common where photos are aligned."""
    assert read(np.array([[0, 3, -1], [1, 0, -1], [2, 4, -1]])) == [[0, 3], [0, 1], [2, 4]]
    assert read(np.array([[0, 3], [1, 0], [3, 2]])) == [[0, 3], [0, 1], [2, 3]]
    assert read(np.array([[3, 0], [0, 1], [4, 2]])) == [[0, 3], [0, 1], [2, 4]]
    for alone in (-1, [0, 1, 2]):
        assert read(np.stack([np.arange(3), np.broadcast_to(alone, 3)], axis=1)) == [[0], [1], [2]]
    assert read(np.array([0, 1, 2])) == [[0], [1], [2]]


def test_archives_and_damaged_files(read, tmp_path):
    np.savez(tmp_path / "p.npz", MATRIX)
    with pytest.raises(ValueError, match="p.npz is an .npz archive; save the one array"):
        read((tmp_path / "p.npz").read_bytes(), "p.npz")
    np.save(tmp_path / "whole.npy", MATRIX)
    whole = (tmp_path / "whole.npy").read_bytes()
    for content in (whole[:-8], whole + b"\0"):
        with pytest.raises(ValueError, match=r"holds 1\d\d bytes of values, but its header says 120"):
            read(content)
    endless = whole[:8] + (9000).to_bytes(2, "little") + whole[10:60].replace(b"(3, 5)", b"(" + b"1" * 40) + b"1" * 9000
    for content in (b"", b"no array", whole[:20], whole.replace(b"(3, 5)", b"(((((("), endless, pickle.dumps([1])):
        with pytest.raises(ValueError, match="not a .npy file"):
            read(content)
    with pytest.raises(ValueError, match="p.json is not a .csv or .npy file"):
        read("[[0, 1]]", "p.json")


def nested(instruction):
    """A pickle of few bytes whose value, written out, would have 2**60 parts."""
    step = b"h\x00h\x00" + instruction + b"q\x00"
    return b"\x80\x02]q\x00" + 60 * step + b"."


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04cposix\nsystem\n(X\x04\x00\x00\x00trueo.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02ios\nsystem\n.",
        b"\x80\x02cnumpy\ndtype\n]\x85R.",
        nested(b"\x86"),
        nested(b"\x86") [:-1] + b"h\x00\x93.",
        b"\x80\x02cnumpy\ndtype\n" + nested(b"\x86")[2:-1] + b"\x85R.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ],
)  # fmt: skip
def test_a_pickle_runs_nothing_and_fills_no_memory(read, tmp_path, content):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    with pytest.raises(ValueError, match="is not a .npy file of index arrays"):
        read(header.getvalue() + content)


def test_mutated_files_are_read_or_refused(read):
    """Some of many more that were tried once."""
    rng = np.random.default_rng(0)
    text = "query,database\n" + "".join(f"{q:02d}.jpg,{d}\n" for q, row in enumerate(RIGHT) for d in row)
    whole = [pickled(headed(RIGHT), 2), pickled(objects([np.array(row) for row in RIGHT]), 4), text.encode()]
    for number in range(450):
        content = bytearray(whole[number % 3])
        for _ in range(rng.integers(1, 4)):
            place, length = int(rng.integers(len(content))), int(rng.integers(1, 20))
            match rng.integers(4):
                case 0:
                    content[place] ^= 1 << int(rng.integers(8))
                case 1:
                    del content[place : place + length]
                case 2:
                    content[place:place] = rng.bytes(length)
                case 3:
                    content[place:place] = content[place : place + length]
        try:
            found = read(bytes(content), "p.csv" if number % 3 == 2 else "p.npy")
        except ValueError as error:
            assert "\n" not in str(error) and "p." in str(error)
        else:
            assert len(found) == 3 and all(0 <= image < 5 for row in found for image in row)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["0", "1", "10", "2"], ["0", "1", "2", "10"]),
        (["007", "10", "9"], ["007", "9", "10"]),
        (["a/10", "b/2"], ["b/2", "a/10"]),  # numbered through
        (["10/0", "10/1", "9/0", "9/1"], ["9/0", "9/1", "10/0", "10/1"]),  # numbered in each folder
        (["img1", "img10", "img2"], ["img1", "img10", "img2"]),
        (["1", "10", "2", "x"], ["1", "10", "2", "x"]),
    ],
)
def test_indices_count_numbers_as_numbers(names, order):
    paths = [f"folder/{name}.jpg" for name in names]
    assert sorted(paths) == paths
    assert [names[index] for index in natural_order(paths)[0]] == order


def test_each_side_is_counted_by_its_own_names(read, caplog):
    caplog.set_level(logging.INFO)
    numbers = [f"db/{name}.jpg" for name in sorted(map(str, range(11)))]  # 0, 1, 10, 2, ...
    places = [f"asked/place{name}.jpg" for name in sorted(map(str, range(11)))]
    rows = np.arange(11)
    assert read(rows, database=numbers, queries=places) == [[0], [1], *([n] for n in range(3, 11)), [2]]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "--positives_file counts each database image by the number that is its name, so 2 is 2.jpg; by its name as "
        "text it would be 10.jpg",
        "--positives_file counts each query by its name as text, so 2 is place10.jpg; by the numbers in its name it "
        "would be place2.jpg",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    # In text, names need no count.
    caplog.clear()
    assert read("place10.jpg,10.jpg\n", database=numbers, queries=places)[2] == [2]
    assert "counts each" not in caplog.text
    assert read("place10.jpg,10\n", database=numbers, queries=places)[2] == [2]
    assert "counts each database image by the number" in caplog.text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny").state_dict(), path)
    return path


@pytest.mark.parametrize("digits", [1, 3])
def test_numbered_photos_find_their_own(weights, tmp_path, capsys, digits):
    rng = np.random.default_rng(0)
    for side in ("ref", "query"):
        (tmp_path / side).mkdir()
    for n in range(12):
        path = tmp_path / "ref" / f"{n:0{digits}d}.jpg"
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60)).save(path)
    for n in range(12):
        shutil.copy(tmp_path / "ref" / f"{(n + 1) % 12:0{digits}d}.jpg", tmp_path / "query" / f"{n:0{digits}d}.jpg")
    np.save(tmp_path / "right.npy", headed([[(n + 1) % 12] for n in range(12)]), allow_pickle=True)
    flags = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56 --recall_values 1".split()
    flags += [f"--resume={weights}", f"--save_dir={tmp_path}/run", f"--positives_file={tmp_path}/right.npy"]
    eval_script.main([*flags, f"--database_folder={tmp_path}/ref", f"--queries_folder={tmp_path}/query"])
    shown = capsys.readouterr().err
    assert "(12 database, 12 queries): R@1: 100.0" in shown
    assert ("by its name as text it would be 10.jpg" in shown) == (digits == 1)


def test_a_file_counts_what_the_folders_hold_before_anything_is_left_out(tmp_path):
    for name, shade in (("known/0.png", 0), ("known/asked/1.png", 80), ("known/2.png", 160)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(tmp_path / name)
    (tmp_path / "p.csv").write_text("query,database\n0,2\n0,asked/1.png\n")
    folders = tmp_path / "known", tmp_path / "known" / "asked"
    dataset = DatabaseQueries.from_folders(*folders, name="x", exif=True, positives_file=tmp_path / "p.csv")
    assert [path[-5:] for path in dataset.database_paths] == ["0.png", "2.png"]
    assert lists(dataset.positives(25.0)) == [[1]]


def test_correct_photos_that_are_queries_too_are_named_as_the_cause(tmp_path, caplog):
    for name, shade in (("known/0.png", 0), ("known/asked/1.png", 80), ("known/asked/2.png", 160)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(tmp_path / name)
    folders, file = (tmp_path / "known", tmp_path / "known" / "asked"), tmp_path / "p.csv"
    for text, lost in (("1.png,asked/1.png\n2.png,0.png\n", 1), ("1.png,0.png\n1.png,asked/1.png\n", 0)):
        caplog.clear()
        file.write_text(text)
        dataset = DatabaseQueries.from_folders(*folders, name="x", exif=True, positives_file=file)
        assert lists(dataset.positives(25.0)) == ([[], [0]] if lost else [[0], []])
        said = [line for line in caplog.messages if "count as missed" in line]
        assert said == lost * [
            f"x: for 1 of 2 queries, all correct photos in {file} were left out of the database because they are also "
            "queries; they count as missed"
        ]
