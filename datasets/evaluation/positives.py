"""Reads which database images are correct for each query: `.csv` pairs, or `.npy` indices or a matrix.

An index counts the photos of its side in the order of their names or, if all names of a side are plain numbers, in the
order of these numbers (0, 1, 2, ..., 10), as VPR-Bench does.
"""

import csv
import io
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .object_arrays import NUMBERS, Unfinished, object_array, shown

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
WANTED = (
    "give a .csv with a row `query,database image` for each correct pair, or a .npy with the indices of each query's "
    "correct images (integers Q x P, or an object array of Q lists) or a 0/1 matrix, Q x N"
)
LONGEST_HEADER = 2**16  # of a .npy file, in bytes; NumPy pads it to 128


@dataclass(frozen=True)
class _Side:
    """The database or the queries: photos that a file refers to by name or index.

    Attributes:
        what: "query" or "database image".
        paths: paths in the order of names.
        folder: folder they were found in; None if unknown.
    """

    what: str
    paths: Sequence[str]
    folder: Path | None

    @property
    def by_name(self) -> dict[str, list[int]]:
        """The photos of each base name."""
        found: dict[str, list[int]] = {}
        for index, path in enumerate(self.paths):
            found.setdefault(os.path.basename(path), []).append(index)
        return found

    def counted(self) -> NDArray[np.int64]:
        """What the indices 0, 1, 2, ... in a file mean, as indices of `paths`. Logs it if that is ambiguous."""
        order, numeric = natural_order(self.paths)
        text = np.arange(len(self.paths))
        differ = np.flatnonzero(numeric != text)
        if len(differ):
            first = int(differ[0])
            plain = not np.array_equal(order, text)
            as_number, as_text = (os.path.basename(self.paths[index]) for index in (numeric[first], first))
            logger.log(
                logging.INFO if plain else logging.WARNING,
                "--positives_file counts each %s by %s, so %d is %s; by %s it would be %s",
                self.what,
                "the number that is its name" if plain else "its name as text",
                first,
                as_number if plain else as_text,
                "its name as text" if plain else "the numbers in its name",
                as_text if plain else as_number,
            )
        return order


def _number(path: str) -> int | None:
    """The file's name as a number; None if it is not one."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return int(stem) if re.fullmatch("[0-9]+", stem) else None


def natural_order(paths: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order in which indices count sorted paths, and the order by all numbers in their names.

    Both are indices of `paths`. They are the same if every name is a plain number; otherwise the first is 0, 1, 2, ...
    Photos in several folders are counted by their numbers alone, unless a number appears twice; then folder by folder.
    """

    def by_folder(index: int) -> list[tuple[bool, int, str]]:
        # Digits before text, so that only values of one type are compared.
        parts = re.split("([0-9]+)", paths[index].replace(os.sep, "\0"))
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]

    numbers = [_number(path) for path in paths]
    plain = bool(numbers) and None not in numbers
    distinct = len(set(numbers)) == len(numbers)
    key: Callable[[int], Any] = numbers.__getitem__ if plain and distinct else by_folder
    numeric = np.array(sorted(range(len(paths)), key=key), dtype=np.int64)
    return (numeric if plain else np.arange(len(paths))), numeric


def read_positives(
    path: Path,
    database_paths: Sequence[str],
    queries_paths: Sequence[str],
    folders: tuple[Path, Path] | None = None,
) -> list[NDArray[np.int64]]:
    """Reads from a file which database images are correct for each query.

    Args:
        path: text with two columns, query and database image, a row for each correct pair, both as indices (from 0) or
            as file names, with or without folders, and an optional header; separated by commas, semicolons or tabs. Or
            a NumPy array: indices as integers Q x P (negative ones are ignored) or as an object array of Q arrays or
            lists, each optionally after its query's own index as in VPR-Bench's files; or a 0/1 or boolean matrix
            Q x N.
        database_paths: the N images of the database, sorted.
        queries_paths: the Q queries, sorted.
        folders: folders of database and queries, to which paths in the file may be relative.

    Returns:
        For each query, in the order of `queries_paths`, sorted indices of `database_paths`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed or ambiguous, or names missing photos; the message names file and line or row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check --positives_file")
    of_database, of_queries = folders if folders is not None else (None, None)
    database = _Side("database image", database_paths, of_database)
    queries = _Side("query", queries_paths, of_queries)
    with open(path, "rb") as file:
        start = file.read(6)
    suffix = path.suffix.lower()
    if start == b"\x93NUMPY":
        read: Callable[[Path, _Side, _Side], list[NDArray[np.int64]]] = _from_npy
    elif start.startswith(b"PK"):
        raise ValueError(f"{path} is an .npz archive; save the one array in it as .npy")
    elif suffix in TEXT_SUFFIXES:
        read = _from_text
    else:
        raise ValueError(f"{path} is not a {suffix if suffix == '.npy' else '.csv or .npy'} file; {WANTED}")
    positives = read(path, database, queries)
    if not any(map(len, positives)):
        raise ValueError(f"{path} has no correct image for any query; {WANTED}")
    return positives


def _placed(rows: Sequence[NDArray[np.int64]], database: _Side, queries: _Side) -> list[NDArray[np.int64]]:
    """Converts rows, with queries and database images as the file counts them, to the order of the paths."""
    of_database, of_queries = database.counted(), queries.counted()
    if all(np.array_equal(order, np.arange(len(order))) for order in (of_database, of_queries)):
        return list(rows)  # not copied: a matrix may be dense
    placed: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(rows)
    for row, query in zip(rows, of_queries, strict=True):
        placed[query] = np.sort(of_database[row])
    return placed


def read_text(path: Path) -> str:
    """Reads text with file names or keys, without byte order mark; bytes that are not UTF-8 are read as in file names.

    Raises:
        ValueError: it is not text.
    """
    content = path.read_bytes()
    if b"\0" in content:
        line = 1 + content.count(b"\n", 0, content.index(b"\0"))
        raise ValueError(f"{path}, line {line}: not text in UTF-8, but perhaps UTF-16; save it as UTF-8")
    return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _from_text(path: Path, database: _Side, queries: _Side) -> list[NDArray[np.int64]]:
    text = read_text(path)
    table: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text), strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                table.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {WANTED}") from None
    sides = [queries, database]
    names = [side.by_name for side in sides]
    if table and _is_header(table[0][1], names):
        line, header = table.pop(0)
        if _database_first(header, f"{path}, line {line}"):
            sides.reverse()
            names.reverse()
        what = f"its first row, {_shown(header)}, is a header"
    elif table:
        what = f"it has no header: its first row, {_shown(table[0][1])}, is a pair"
    if table:
        logger.info("%s: %s; column 1 is the %s, column 2 the %s", path, what, *(side.what for side in sides))

    counted: list[NDArray[np.int64] | None] = [None, None]
    found: list[set[int]] = [set() for _ in queries.paths]
    for line, row in table:
        where = f"{path}, line {line}"
        if len(row) != 2:
            raise ValueError(
                f"{where}: {_shown(row)} has {len(row)} column{'s' if len(row) != 1 else ''} instead of 2, "
                "query and database image, separated by a comma, semicolon or tab; correct it"
            )
        pair = []
        for column, (cell, side) in enumerate(zip(row, sides, strict=True)):
            if not re.fullmatch("[0-9]+", cell):
                pair.append(_named(cell, side, names[column], where, row))
                continue
            # Longer numbers, which Python might refuse to read, are out of range.
            index = int(cell) if len(cell) < 19 else math.inf
            if index >= len(side.paths):
                raise ValueError(
                    f"{where} names {side.what} {cell[:30]}, but there are {len(side.paths)}, counted from 0; "
                    "give the file of this dataset"
                )
            order = counted[column]
            if order is None:
                order = counted[column] = side.counted()
            pair.append(int(order[int(index)]))
        query, image = pair if sides[0] is queries else pair[::-1]
        found[query].add(image)
    return [np.array(sorted(images), dtype=np.int64) for images in found]


def _shown(row: list[str]) -> str:
    text = ",".join(row)
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def _separator(text: str) -> str:
    """The separator: a semicolon or tab if the first non-blank line has one and no comma, else a comma."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return next((sign for sign in ";\t" if sign in first and "," not in first), ",")


def _database_first(header: list[str], where: str) -> bool:
    """Whether a header names the database images before the queries; an unclear column follows from the other."""
    words = [re.sub("(?<=[a-z])(?=[A-Z])", "_", cell).lower() for cell in header]
    of_queries = [re.search("quer|(?<![a-z])q(?![a-z])", word) is not None for word in words]
    of_database = [
        re.search("data_?base|reference|gallery|(?<![a-z])(db|ref|map)s?(?![a-z])", word) is not None and not query
        for word, query in zip(words, of_queries, strict=True)
    ]
    if all(of_database):
        raise ValueError(
            f"{where}: both columns of the header {_shown(header)} name database images; name one `query`, or leave "
            "the header out and put the queries first"
        )
    return not of_queries[0] and (of_queries[1] or of_database[0])


def _is_header(row: list[str], names: Sequence[dict[str, list[int]]]) -> bool:
    """Whether a first row has two words rather than numbers or possible file names."""
    return len(row) == 2 and not any(
        re.fullmatch("[-+]?[0-9][0-9.eE+-]*", cell) or os.path.splitext(cell)[1] or os.path.basename(cell) in by_name
        for cell, by_name in zip(row, names, strict=True)
    )


def _named(cell: str, side: _Side, by_name: dict[str, list[int]], where: str, row: list[str]) -> int:
    """The photo that a cell names: by its file name, with or without folders above it."""
    parts = os.path.normpath(cell).split(os.sep)
    candidates = [
        index for index in by_name.get(parts[-1], []) if side.paths[index].split(os.sep)[-len(parts) :] == parts
    ]
    if os.path.isabs(cell):
        wanted = os.path.realpath(cell)
        candidates = [i for i in by_name.get(parts[-1], []) if os.path.realpath(side.paths[i]) == wanted]
    if len(candidates) > 1 and len(parts) > 1 and side.folder is not None:
        below = os.path.normpath(os.path.join(side.folder, *parts))
        candidates = [index for index in candidates if os.path.normpath(side.paths[index]) == below] or candidates
    if not candidates:
        raise ValueError(
            f"{where}: the row {_shown(row)} is not a query and a database image of this dataset, as indices or "
            f"file names (no {side.what} is {_shown([cell])}); correct it"
        )
    if len(candidates) > 1:
        first, second = (side.paths[index] for index in candidates[:2])
        raise ValueError(
            f"{where}: {len(candidates)} photos are named {cell!r}, e.g. {first} and {second}; give its folder too"
        )
    return candidates[0]


def _from_npy(path: Path, database: _Side, queries: _Side) -> list[NDArray[np.int64]]:
    counts = len(queries.paths), len(database.paths)
    descr, fortran, shape, offset = _npy_header(path)
    if re.fullmatch(r"[|<>=]?O[48]?", descr):
        try:
            array = object_array(path.read_bytes()[offset:])
            if array.shape != shape:
                raise ValueError(f"its header says {shape}, but its content {array.shape}")
        except ValueError as error:
            raise ValueError(f"{path} is not a .npy file of index arrays ({str(error)[:100]}); {WANTED}") from error
        rows = _object_rows(path, array, *counts)
    else:
        if not re.fullmatch(rf"[|<>=]?({NUMBERS})", descr):
            raise ValueError(f"{path} holds values of type {descr!r}, which are not indices; {WANTED}")
        dtype = np.dtype(descr)
        size, expected = path.stat().st_size - offset, math.prod(shape) * dtype.itemsize
        if size != expected:
            raise ValueError(f"{path} holds {size} bytes of values, but its header says {expected}; write it again")
        if not expected:
            raise ValueError(f"{path} holds no values, shape {shape}; {WANTED}")
        order: Any = "F" if fortran else "C"
        rows = _number_rows(path, np.memmap(path, dtype, "r", offset, shape, order), *counts)
    return _placed(rows, database, queries)


def _npy_header(path: Path) -> tuple[str, bool, tuple[int, ...], int]:
    """Type, Fortran order, shape and offset of the values; by patterns, since input can overrun Python's parser."""
    with open(path, "rb") as file:
        start = file.read(LONGEST_HEADER)
    wide = 2 if start[6:7] == b"\x01" else 4
    begin = 8 + wide
    end = begin + int.from_bytes(start[8:begin], "little")
    header = start[begin:end].decode("latin-1")
    found = re.fullmatch(r"\s*\{(.*)\}\s*", header)
    fields = {}
    if found and end <= len(start) and start[6:7] in (b"\x01", b"\x02", b"\x03"):
        value = r"'[^']*'|True|False|\([0-9L,\s]*\)"  # 12L is how Python 2 writes 12
        fields = dict(re.findall(rf"'(descr|fortran_order|shape)'\s*:\s*({value})\s*(?:,|$)", found[1].strip()))
    if set(fields) != {"descr", "fortran_order", "shape"} or fields["shape"][0] != "(" or fields["descr"][0] != "'":
        raise ValueError(f"{path} is not a .npy file of one plain array (its header is {header[:80]!r}); {WANTED}")
    sizes = re.findall("[0-9]+", fields["shape"])
    if len(sizes) > 3 or any(len(size) > 18 for size in sizes):
        raise ValueError(f"{path} holds an array of shape {fields['shape'][:80]}; {WANTED}")
    return fields["descr"].strip("'"), fields["fortran_order"] == "True", tuple(map(int, sizes)), end


def _number_rows(path: Path, array: NDArray[Any], queries: int, database: int) -> list[NDArray[np.int64]]:
    """Each query's correct images of an array of numbers or booleans, read row by row."""
    if array.ndim == 1 and array.dtype.kind != "b":
        array = array[:, None]  # one correct image per query
    if array.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {array.shape}; {WANTED}")
    if len(array) != queries:
        turned = ", like the transposed matrix" if array.shape == (database, queries) else ""
        raise ValueError(f"{path} has {len(array)} rows for {queries} queries{turned}; give the file of this dataset")
    square = array.shape[1] == database
    if array.dtype.kind == "b" and not square:
        raise ValueError(
            f"{path} is a boolean matrix with {array.shape[1]} columns for {database} database images; "
            "give the file of this dataset"
        )
    zero_one, repeats, largest = True, False, -1
    rows = []
    for number, row in enumerate(array):
        row = _whole(path, number, np.asarray(row))
        zero_one = zero_one and bool(((row == 0) | (row == 1)).all())
        indices = np.unique(row[row >= 0])
        repeats = repeats or len(indices) < int(np.count_nonzero(row >= 0))
        largest = max(largest, int(indices[-1]) if len(indices) else -1)
        rows.append(indices)

    matrix = [np.flatnonzero(np.asarray(row)) for row in array] if zero_one and square else None
    # The indices 0 and 1 of at most two images; it does not matter if both mean the same.
    could_be_indices = array.dtype.kind != "b" and largest < database and not repeats
    if matrix is not None:
        if could_be_indices and not all(map(np.array_equal, rows, matrix)):
            raise ValueError(
                f"{path} could hold indices or a 0/1 matrix, with different meanings; save it as booleans, or as .csv"
            )
        logger.info("%s is a 0/1 matrix, %d queries x %d database images", path, *array.shape)
        return matrix
    if array.shape[1] == 2 and array.dtype.kind != "b":
        _require_no_pairs(path, array)
    _require_below(path, rows, database)
    if repeats and (zero_one or square):
        raise ValueError(
            f"{path} repeats indices within a row, so its {array.shape[1]} columns are neither a list of them nor a "
            f"0/1 matrix for {database} database images; {WANTED}"
        )
    return rows


def _require_no_pairs(path: Path, array: NDArray[Any]) -> None:
    """Raises ValueError if two columns may be pairs rather than lists of two: the first has each query once."""
    first, second = (_whole(path, 0, np.asarray(column)) for column in array.T)
    if not np.array_equal(np.sort(first), np.arange(len(first))):
        return
    if np.array_equal(first, second) or not (second >= 0).any():
        return  # one image per query, of its own number: as pairs it means the same, or nothing
    raise ValueError(
        f"{path} could hold pairs `query, database image` or the indices of two correct images for each query, since "
        f"its first column names each query, 0 to {len(first) - 1}, once; save pairs as .csv, or their second column "
        "alone, sorted by query; save two images each with a third column of -1"
    )


def _whole(path: Path, number: int, row: NDArray[Any]) -> NDArray[np.int64]:
    """A row of numbers as integers, negative ones and NaN as -1; fractions and infinities are refused."""
    if row.dtype.kind == "f":
        row = np.where(np.isnan(row), -1.0, row)
        bad = np.flatnonzero(row != np.floor(row)) if np.isfinite(row).all() else np.flatnonzero(~np.isfinite(row))
        if len(bad):
            raise ValueError(f"{path}, row {number}: {row[bad[0]]} is not a whole number; {WANTED}")
    # Exact up to 2**53, more images than any dataset has; as integers, the largest unsigned ones would turn negative.
    return np.clip(row.astype(np.float64), -1, 2.0**62).astype(np.int64)


def _require_below(path: Path, rows: Sequence[NDArray[np.int64]], database: int) -> None:
    for number, row in enumerate(rows):
        if len(row) and row[-1] >= database:
            raise ValueError(
                f"{path}, row {number}: it names database image {row[-1]}, but there are {database}, counted from 0; "
                "give the file of this dataset"
            )


def _object_rows(path: Path, array: NDArray[Any], queries: int, database: int) -> list[NDArray[np.int64]]:
    """Each query's correct images of an array of lists and arrays."""
    if array.ndim not in (1, 2) or len(array) != queries:
        raise ValueError(
            f"{path} has {len(array) if array.ndim else 0} rows for {queries} queries, shape {array.shape}; "
            "give the file of this dataset"
        )
    values: list[Any] = list(array[:, 0] if array.shape[1:] == (1,) else array)
    headed = [_flat(value) for value in values]
    order = list(range(queries))
    # Among lists, a bare number is a list of one; with bare numbers only, the first may or may not be a query.
    paired = all(
        row is not None and len(row) == 2 and (type(row[1]) is int or _flat(row[1]) is not None) for row in headed
    )
    if paired and any(row is not None and _flat(row[1]) is not None for row in headed):
        order = [row[0] for row in headed if row is not None]
        values = [row[1] for row in headed if row is not None]
        seen = set()
        for number, query in enumerate(order):
            if type(query) is not int or not 0 <= query < queries or query in seen:
                raise ValueError(
                    f"{path}, row {number}: it starts with {shown(query)}, but each query 0 to {queries - 1} "
                    "must come once; give the file of this dataset"
                )
            seen.add(query)
    rows = [_number_row(path, number, value, database) for number, value in enumerate(values)]
    if len({len(row) for row in rows}) == 1 and len(rows[0]):
        found = _number_rows(path, np.stack(rows), queries, database)
    else:
        if any(row.dtype.kind == "b" for row in rows):
            raise ValueError(f"{path} holds booleans in rows of several lengths; {WANTED}")
        whole = [_whole(path, number, row) for number, row in enumerate(rows)]
        found = [np.unique(row[row >= 0]) for row in whole]
        _require_below(path, found, database)
        repeats = any(len(kept) < np.count_nonzero(row >= 0) for kept, row in zip(found, whole, strict=True))
        if repeats and max((row[-1] for row in found if len(row)), default=0) < 2:
            raise ValueError(f"{path} repeats 0 and 1 within rows, which are not lists of indices; {WANTED}")
    placed = [np.empty(0, dtype=np.int64)] * queries
    for query, indices in zip(order, found, strict=True):
        placed[query] = indices
    return placed


def _flat(value: Any) -> Sequence[Any] | NDArray[Any] | None:
    """A list, a tuple or a one-dimensional array, not copied: many rows of a damaged file may be the same object."""
    if isinstance(value, Unfinished):
        value = value.value
    if isinstance(value, np.ndarray):
        return value.ravel() if value.ndim and sum(side != 1 for side in value.shape) < 2 else None
    return value if isinstance(value, (list, tuple)) else None


def _number_row(path: Path, number: int, value: Any, database: int) -> NDArray[Any]:
    """A row of an object array as numbers or booleans, at most as many as there are database images."""
    row = [value] if type(value) is int else _flat(value)
    if row is None or len(row) > max(database, 1):
        found = "not a list" if row is None else f"a list of {len(row)} for {database} database images"
        raise ValueError(f"{path}, row {number}: {found}; {WANTED}")
    if isinstance(row, np.ndarray) and row.dtype != object:
        return row if len(row) else np.empty(0, dtype=np.int64)
    if not all(type(item) in (int, float, bool) for item in row):
        raise ValueError(f"{path}, row {number}: it does not hold only numbers; {WANTED}")
    if any(type(item) is int and abs(item) > 2**62 for item in row):
        raise ValueError(f"{path}, row {number}: an index is too large for any dataset; {WANTED}")
    return np.array(row) if len(row) else np.empty(0, dtype=np.int64)
