"""Reads NumPy's object arrays of lists, arrays and numbers, as VPR-Bench has them.

Such a file is a pickle, a program that can call anything. So it finds no class or function but the stand-ins below, and
may only have the instructions that NumPy writes: others can fill the memory by themselves.
"""

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

INSTRUCTIONS = set(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND "
    "APPENDS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)


class _Dtype:
    def __init__(self, name: str, *_: object):
        if not re.fullmatch("O8?|b1|[iuf][1248]", name):
            raise ValueError(f"values of type {name[:20]!r}")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.name = ">" * (state[1] == ">") + self.name


class _Array:
    values: NDArray[Any] = np.empty(0)  # until they come

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.name in ("O", "O8"):
            values = np.fromiter(content, dtype=object)
        else:
            values = np.frombuffer(_bytes(content), dtype.name)
        self.values = values.reshape(shape, order="F" if fortran else "C")


def _bytes(content: Any = b"", *_: object) -> bytes:
    # Python 2 writes bytes as text, Python 3 for Python 2 as text to encode.
    return content.encode("latin-1") if isinstance(content, str) else bytes(memoryview(content))


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return np.frombuffer(_bytes(content), dtype.name)[0].item()


STAND_INS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _scalar,
    "_codecs.encode": _bytes,
    "__builtin__.bytes": _bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if full_name not in STAND_INS:
            raise ValueError(f"it holds {full_name[:80]!r}")
        return STAND_INS[full_name]


def object_rows(content: bytes, queries: int) -> list[Any]:
    """Each query's list, tuple or array of any values, from an object array's pickle. Its rows are these, or pairs of a
    query's number and these.

    Raises:
        Exception: of some kind, where the pickle is damaged or describes anything else.
    """
    for instruction, argument, _ in pickletools.genops(content):
        # The number of an entry beyond all entries would take memory for all below it.
        beyond = instruction.name == "LONG_BINPUT" and int(argument or 0) > len(content)
        if beyond or instruction.name not in INSTRUCTIONS:
            raise ValueError(f"its pickle has the instruction {instruction.name}")
    array = _Unpickler(io.BytesIO(content), encoding="latin-1").load().values
    if array.dtype != object or array.ndim not in (1, 2) or len(array) != queries:
        raise ValueError(f"an array of shape {array.shape} for {queries} queries")
    rows = [getattr(row, "values", row) for row in array]
    if not all(len(row) == 2 and isinstance(row[1], (list, tuple, np.ndarray, _Array)) for row in rows):
        return rows
    lists = {query: getattr(row, "values", row) for query, row in rows if type(query) is int}
    if lists.keys() != set(range(queries)):
        raise ValueError(f"its first column does not name each query, 0 to {queries - 1}, once")
    return [lists[query] for query in range(queries)]
