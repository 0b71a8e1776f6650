"""Reads the pickle of an object array of lists, arrays and numbers without running it.

A pickle is a program that can call anything, and a damaged one can crash the interpreter. So the unpickler never runs:
this module reads the few instructions that NumPy writes for such arrays, and builds nothing else.
"""

import math
import pickletools
import re
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = "b1|[iu][1248]|f[248]"  # NumPy's data types, as written in its files


class _Global(str):
    """One of the few global names in an array's pickle."""


class _Dtype:
    """A NumPy type that is still being read."""

    def __init__(self, text: Any):
        if not isinstance(text, str) or not re.fullmatch(rf"[|<>=]?(O[48]?|{NUMBERS})", text):
            raise ValueError(f"it holds values of the type {shown(text)}")
        self.text = text

    @property
    def of_objects(self) -> bool:
        return "O" in self.text

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("damaged")
        if not self.of_objects:
            self.text = state[1] + self.text.lstrip("|<>=")


class Unfinished:
    """An array that is still being read."""

    value: NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or len(shape) > 3:
            raise ValueError("damaged")
        if not all(type(side) is int and 0 <= side < 2**48 for side in shape) or type(fortran) not in (bool, int):
            raise ValueError("damaged")
        order: Any = "F" if fortran else "C"
        count = math.prod(shape)
        if dtype.of_objects:
            if not isinstance(data, list) or len(data) != count:
                raise ValueError("damaged")
            flat = np.empty(count, dtype=object)
            for index, item in enumerate(data):
                flat[index] = item.value if isinstance(item, Unfinished) else item
        else:
            kind = np.dtype(dtype.text)
            if isinstance(data, str):  # how Python 2 wrote bytes
                data = data.encode("latin-1")
            if not isinstance(data, bytes) or len(data) != count * kind.itemsize:
                raise ValueError("damaged")
            flat = np.frombuffer(data, dtype=kind)
        self.value = flat.reshape(shape, order=order)


_MULTIARRAY = {"numpy.core.multiarray", "numpy._core.multiarray"}


def shown(value: Any) -> str:
    """A value for an error; of lists only the type, since one that repeats another many times would never end."""
    return repr(value)[:60] if type(value) in (str, int, float, bool) else type(value).__name__


def _global(module: Any, name: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("damaged")
    if module in _MULTIARRAY and name in ("_reconstruct", "scalar"):
        return _Global(name)
    if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("__builtin__", "bytes")):
        return _Global(name)
    raise ValueError(f"it holds {module[:80]}.{name[:80]}")


def _called(function: Any, arguments: Any) -> Any:
    """Does what the pickle of an array calls, without calling it."""
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("damaged")
    if function == "_reconstruct" and len(arguments) == 3 and arguments[0] == "ndarray":
        return Unfinished()
    if function == "dtype" and 1 <= len(arguments) <= 3:
        return _Dtype(arguments[0])
    if function == "encode" and len(arguments) in (1, 2) and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")  # how Python 3 writes bytes for Python 2
    if function == "bytes" and not arguments:
        return b""
    if function == "scalar" and len(arguments) == 2 and isinstance(arguments[0], _Dtype):
        dtype, data = arguments
        data = data.encode("latin-1") if isinstance(data, str) else data
        if not dtype.of_objects and isinstance(data, bytes) and len(data) == np.dtype(dtype.text).itemsize:
            return np.frombuffer(data, dtype=dtype.text)[0].item()
    raise ValueError("damaged")


def object_array(data: bytes) -> NDArray[Any]:
    """The object array of lists, arrays and numbers that a pickle describes.

    Lists may contain `Unfinished` arrays, whose `value` is the array.

    Raises:
        ValueError: the pickle has other instructions, or inconsistent ones.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd text in a damaged file
            array = _run(data)
    except (LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"damaged, {type(error).__name__}") from error
    if not isinstance(array, Unfinished) or array.value is None or array.value.dtype != object:
        raise ValueError("damaged, no array of objects")
    return array.value


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def popped() -> Any:
        if marks and len(stack) <= marks[-1]:
            raise ValueError("damaged")
        return stack.pop()

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return popped()
        if name == "MARK":
            marks.append(len(stack))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append([] if name == "EMPTY_LIST" else ())
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(reversed([popped() for _ in range(int(name[-1]))])))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [popped()]
            if not isinstance(stack[-1], list):
                raise ValueError("damaged")
            stack[-1].extend(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            of, module = popped(), popped()
            stack.append(_global(module, of))
        elif name == "REDUCE":
            arguments, function = popped(), popped()
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            state = popped()
            if not isinstance(stack[-1], (Unfinished, _Dtype)):
                raise ValueError("damaged")
            stack[-1].build(state)
        else:
            raise ValueError(f"it has the instruction {name}, which no array of indices needs")
    raise ValueError("damaged")
