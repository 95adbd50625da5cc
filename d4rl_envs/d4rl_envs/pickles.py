"""Pickled arrays, as numpy's .npy files of objects hold them, read without running the code that a pickle can hold."""

import math
import pickle
import re
from typing import Any

import numpy as np


class PickledType:
    """What stands for a dtype in a pickle: only plain numbers, and objects that stand in a list."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch("[biuf][0-9]{1,2}|O8?", code):
            raise pickle.UnpicklingError(f"it holds {code!r} values, not only arrays of numbers")
        self.code = code[0] if code[0] == "O" else code

    def __setstate__(self, state: tuple) -> None:
        self.code = (">" if state[1] == ">" else "") + self.code.lstrip(">")


class PickledArray(np.ndarray):
    """What stands for an array in a pickle: numpy fills it, from bytes of just its size or from a list."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        if type(kind) is not PickledType or min(shape, default=0) < 0:
            raise pickle.UnpicklingError("an array's shape or kind is none")
        dtype = np.dtype(kind.code)
        held, width = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
        if type(content) is not held or len(content) != math.prod(shape) * width:
            raise pickle.UnpicklingError("an array's content does not fit its shape")
        super().__setstate__((1, tuple(shape), dtype, bool(is_fortran), content))


def pickled_scalar(kind: PickledType, content: bytes) -> Any:
    array = PickledArray(0)
    array.__setstate__((1, (), kind, False, content))
    return array[()]


def pickled_bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # as protocol 2 writes bytes


class ArrayUnpickler(pickle.Unpickler):
    """Admits arrays of numbers, and lists of such, beside Python's own kinds of values: other pickles could run code.

    No function of numpy's is called with what the file says: those trust it, and read whatever address it names.
    """

    ADMITTED = {"multiarray._reconstruct": lambda *_: PickledArray(0), "multiarray.scalar": pickled_scalar}
    ADMITTED |= {"numpy.ndarray": None, "numpy.dtype": PickledType, "_codecs.encode": pickled_bytes}
    ADMITTED |= {"__builtin__.bytes": lambda: b"", "collections.OrderedDict": dict}

    def find_class(self, module: str, name: str) -> Any:
        key = f"{re.sub(r'^numpy[.](_?core)[.]', '', module)}.{name}"
        if key not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, not only arrays")
        return self.ADMITTED[key]
