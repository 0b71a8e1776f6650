"""Files that say which database images are correct for each query: three forms, and nothing that is not one of them."""

import io
import logging
import os
import pickle
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from datasets.evaluation.positives import counted, read_positives

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


def stated(shape, content, descr="|O"):
    """A .npy file whose header states a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + content


def pickled(array, protocol):
    """A .npy file as other versions of NumPy and Python write it."""
    return stated(array.shape, pickle.dumps(array, protocol=protocol))


def lists(positives):
    return [row.tolist() for row in positives]


@pytest.fixture
def read(tmp_path):
    """Reads an array, text or bytes as a positives file of three queries and five database images."""

    def run(content, name=None, database=DATABASE, queries=QUERIES, folders=(Path(), Path())):
        path = tmp_path / (name or ("p.npy" if isinstance(content, (np.ndarray, bytes)) else "p.csv"))
        if isinstance(content, np.ndarray):
            with open(path, "wb") as file:
                np.save(file, content, allow_pickle=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return lists(read_positives(path, database, queries, folders))

    return run


MATRIX = np.zeros((3, 5), dtype=bool)
MATRIX[[0, 0, 1], [0, 2, 4]] = True
INDICES = np.array([[2, 0], [4, -1], [-1, -1]])


@pytest.mark.parametrize(
    "array",
    [
        INDICES,
        np.asfortranarray(INDICES.astype(">i2")),
        MATRIX,
        objects(RIGHT),
        objects([np.array(row) for row in RIGHT]),  # the last one of float64, as NumPy makes of an empty list
        np.array(INDICES.tolist(), dtype=object),
        headed(RIGHT, order=[2, 0, 1]),
        headed([np.array(row, dtype=">u2") for row in RIGHT]),
        objects([[n, np.array(row)] for n, row in enumerate(RIGHT)]),
    ],
)
def test_every_form_of_an_array_says_the_same(read, array):
    assert read(array) == RIGHT
    if array.dtype == object:
        for protocol in (2, 3, 4):
            assert read(pickled(array, protocol)) == RIGHT


def test_an_array_of_python_2(read):
    """Whose texts and bytes are of one kind: lists, an array and a number of NumPy's."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def kind(name, order):
        start = b"cnumpy\ndtype\n" + text(name) + b"K\x00K\x01\x87R(K\x03" + text(order)
        return start + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01K"
    number = b"cnumpy.core.multiarray\nscalar\n" + kind(b"i8", b"<") + text((2).to_bytes(8, "little")) + b"\x86R"
    row = array + b"\x01\x85" + kind(b"i4", b">") + b"\x89" + text(b"\0\0\0\x04") + b"tb"
    whole = array + b"\x03\x85" + kind(b"O8", b"|") + b"\x89](](K\x00" + number + b"e" + row + b"]etb"
    assert read(stated((3,), b"\x80\x02" + whole + b".")) == RIGHT


@pytest.mark.parametrize(
    "text",
    [
        "query,database\n0,0\n0,2\n1,4\n0,2",
        "query,database\n00.jpg,00.jpg\n00.jpg,02.jpg\n01.jpg,4\n",
        '\ufeffquery, database\r\n"0","00.jpg"\r\n 0 , 2 \r\n\r\n1,4\r\n',
        "query,database\nasked/00.jpg,db/00.jpg\n./00.jpg,./db/02.jpg\n01.jpg,04.jpg\n",
    ],
)
def test_every_form_of_text_says_the_same(read, caplog, text):
    caplog.set_level(logging.INFO)
    assert read(text) == read(text, "X.CSV") == RIGHT
    assert "3 correct images for 3 queries; for asked/00.jpg the first is db/00.jpg" in caplog.messages[0]


def test_names_that_come_twice_want_their_folder(read):
    database = ["db/a/0.jpg", "db/b/0.jpg", "db/c/a/0.jpg"]
    folders = (Path("db"), Path("q"))
    names = {"a/0.jpg": 0, "db/a/0.jpg": 0, "b/0.jpg": 1, "c/a/0.jpg": 2, os.path.abspath("db/b/0.jpg"): 1}
    for name, image in names.items():
        text = f"query,database\nq.jpg,{name}\n"
        assert read(text, database=database, queries=["q/q.jpg"], folders=folders) == [[image]]
    with pytest.raises(ValueError, match=r"line 2: 3 .*'0.jpg', db/a/0.jpg, db/b/0.jpg"):
        read("query,database\nq.jpg,0.jpg\n", database=database, queries=["q/q.jpg"], folders=folders)


def refused(read, content, *values):
    """In one line with the file, the values and the forms."""
    with pytest.raises(ValueError) as error:
        read(*content)
    line = str(error.value)
    assert "\n" not in line and len(line) < 900
    assert all(value in line for value in ("/p.", "positives_file", "query,database", "padded by -1", *values))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", []),
        ("database,query\n0,1\n", ["line 1", "'database,query'"]),
        ("query,database\n0,5\n", ["line 2", "database image 5 of 5"]),
        ("query,database\n0,0\n3,0\n", ["line 3", "query 3 of 3"]),
        (f"query,database\n0,{'9' * 5000}\n", ["line 2", "999999"]),
        ("query,database\n0,²\n", ["line 2", "'²'"]),
        ("query,database\n00.jpg,nor.jpg\n", ["line 2", "'nor.jpg'"]),
        ("query,database\n0\n", ["line 2"]),
        ('query,database\n0,1\n"0,2\n', ["line 3"]),
        (f"query,database\n0,{'x' * 200_000}\n", ["line 2"]),
    ],
)  # fmt: skip
def test_text_that_is_refused_names_its_line(read, text, values):
    refused(read, [text], *values)


def test_files_of_another_kind(read):
    refused(read, ["query,database\n0,1\n".encode("utf-16"), "p.csv"], "line 1", "UTF-16")
    refused(read, ["query,database\n0,café.jpg\n".encode("latin-1"), "p.csv"], "line 2", r"caf\udce9.jpg")
    refused(read, ["query,database\n0,0\n", "p.tsv"], "neither .csv nor .npy")
    with pytest.raises(ValueError, match="none.npy.*give positives_file"):
        read_positives(Path("none.npy"), DATABASE, QUERIES)


class Harm:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (np.full((3, 2), -1), []),
        (objects([Harm(), [1], [2]]), ["abort"]),
        (np.zeros((4, 1), dtype=int), ["(4, 1)", "3 queries"]),
        (np.zeros((3, 4), dtype=bool), ["(3, 4)", "5 database images"]),
        (np.array([3, 0, 4]), ["(3,)"]),
        (MATRIX.astype(int), ["row 0", "booleans"]),
        (np.array([[0], [1], [7]]), ["row 2", "7"]),
        (np.array([[0], [1], [-2]]), ["row 2", "-2"]),
        (np.array([[0], [1], [2**64 - 1]], dtype=np.uint64), ["row 2", "18446744073709551615"]),
        (objects([[0], [1]]), ["(2,)", "3 queries"]),
        (objects([[0], np.zeros((2, 2), int), [2]]), ["row 1"]),
        (objects([[0], [1.5], [2]]), ["row 1", "1.5"]),
        (objects([[0], np.array([True, False]), [2]]), ["row 1"]),
        (objects([[0], [2**2000], [2]]), []),
        (objects([[0], [0, 1, 2, 3, 4, 0], [2]]), ["row 1", "6", "5"]),
        (objects([[0, 1, 1], [0, 0], [1]]), ["row 0"]),
        (headed(RIGHT, order=[0, 1, 1]), ["each query, 0 to 2, once"]),
        (objects([{"a": 1}, [0], [1]]), ["EMPTY_DICT"]),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(read, array, values):
    refused(read, [array], *values)


@contextmanager
def little_memory(most):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_damaged_files(read):
    np.save(whole := io.BytesIO(), MATRIX)
    np.savez(archive := io.BytesIO(), MATRIX)
    whole = whole.getvalue()
    long = whole[:8] + (30_000).to_bytes(2, "little") + whole[10:60].replace(b"3, 5", b"1" * 30_000)
    damaged = [whole[:-8], whole + b"\0", whole[:20], whole.replace(b"(3, 5)", b"(((((("), long]
    damaged += [stated(shape, b"\0" * 24, "<i8") for shape in ((3, 2**40), (3, 0), (2**62, 0))]
    with little_memory(2**20):
        for content in (b"", b"no array", *damaged, archive.getvalue(), pickle.dumps([1])):
            refused(read, [content])


def nested(instruction):
    """A pickle of few bytes whose value, written out, would have 2**60 parts."""
    step = b"h\x00h\x00" + instruction + b"q\x00"
    return b"\x80\x02]q\x00" + 60 * step + b"."


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy.core.multiarray\nscalar\n" + DTYPE + b"C\x08\x00\x00\x00\x00\x00\x00\x00\x00\x86R.",
        b"\x80\x02c__builtin__\nbytes\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",  # bytes(2**40)
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",  # a bytearray of 2**40
        b"\x80\x02]r\x00\x00\x00\x40.",  # entry 2**30
        # 2**58 rows without a column.
        b"\x80\x03" + ARRAY + b"(K\x01\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x04K\x00\x86" + DTYPE + b"\x89]tb.",
        nested(b"\x86"),
        b"\x80\x02" + b"(" * 100_000 + b".",
    ],
)  # fmt: skip
def test_a_pickle_runs_nothing_and_fills_no_memory(read, content):
    with little_memory(2**26):
        refused(read, [stated((3,), content)])


def test_mutated_files_are_read_or_refused(read):
    """A bit of every third byte changed, and the rest cut off."""
    for whole in (pickled(headed(RIGHT), 2), pickled(objects([np.array(row) for row in RIGHT]), 4)):
        for place in range(0, len(whole), 3):
            changed = bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
            for rest in (changed, b""):
                with suppress(ValueError):
                    assert all(0 <= image < 5 for row in read(whole[:place] + rest) for image in row)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["007", "10", "9"], ["007", "9", "10"]),
        (["a/10", "b/2"], ["b/2", "a/10"]),  # numbered through
        (["10/0", "10/1", "9/0", "9/1"], ["9/0", "9/1", "10/0", "10/1"]),  # numbered in each folder
        (["1", "10", "2", "x"], ["1", "10", "2", "x"]),
    ],
)
def test_indices_count_numbers_as_numbers(names, order):
    paths = [f"folder/{name}.jpg" for name in names]
    assert sorted(paths) == paths
    assert [names[index] for index in counted(paths, "query")] == order


def test_each_side_is_counted_by_its_own_names(read, caplog):
    caplog.set_level(logging.INFO)
    numbers = [f"db/{name}.jpg" for name in sorted(map(str, range(11)))]  # 0, 1, 10, 2, ...
    places = [f"asked/place{name}.jpg" for name in sorted(map(str, range(11)))]
    found = read(np.arange(11)[:, None], database=numbers, queries=places)
    assert found == [[0], [1], *([n] for n in range(3, 11)), [2]]
    said = {record.levelname: record.getMessage() for record in caplog.records[:2]}
    assert "2 is place10.jpg, not place2.jpg" in said["WARNING"] and "2 is 2.jpg, not 10.jpg" in said["INFO"]
    # In text, names need no count.
    caplog.clear()
    assert read("query,database\nplace10.jpg,10.jpg\n", database=numbers, queries=places)[2] == [2]
    assert "counts each" not in caplog.text
    assert read("query,database\nplace10.jpg,10\n", database=numbers, queries=places)[2] == [2]
    assert "counts each database image by its name as a number" in caplog.text
