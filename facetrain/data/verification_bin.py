"""InsightFace's verification files (`lfw.bin`, `cfp_fp.bin`, ...): a pickle of images, and of which pairs match.

A pickle can run anything while it is read. This reader runs nothing of what is in the file: the names that a pickle of
lists, bools, bytes and uint8 arrays needs are answered by stand-ins from this module, and any other name is refused.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class VerificationBin:
    """The pairs of a verification file."""

    images: tuple[bytes, ...]
    """[2n], image files, the two of each pair in turn."""
    is_genuine: NDArray[np.bool_]
    """[n], whether a pair shows one person."""


def read_verification_bin(path: Path) -> VerificationBin:
    """Read a verification file; nothing in it is run.

    Raises:
        ValueError: it holds anything but lists, bools, bytes and uint8 arrays, is damaged, or isn't a list of images
            with a bool for every two of them.
        FileNotFoundError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything: EOFError, KeyError, IndexError, ...
        raise ValueError(f"{path}: not an InsightFace verification file: {error}") from None
    if not (isinstance(content, (tuple, list)) and len(content) == 2 and all(isinstance(x, list) for x in content)):
        raise ValueError(f"{path}: expected a list of images and a list of bools, got {type(content).__name__}")
    images, is_genuine = content
    if len(images) != 2 * len(is_genuine) or not images:
        raise ValueError(f"{path}: expected two images for each bool, got {len(images)} and {len(is_genuine)}")
    for number, flag in enumerate(is_genuine):
        if not isinstance(flag, bool):
            raise ValueError(f"{path}: pair {number}: expected a bool, got {type(flag).__name__}")
    files = [_bytes_of(image) for image in images]
    for number, data in enumerate(files):
        if data is None:
            raise ValueError(f"{path}: image {number}: expected bytes, got {type(images[number]).__name__}")
    return VerificationBin(tuple(data for data in files if data is not None), np.array(is_genuine, dtype=bool))


# Each stand-in is a class with __setstate__, so that a pickle that "builds" on the class itself is an error: on a
# function it would set attributes of this module's code.


class _Dtype:
    """Stands for numpy's dtype uint8."""

    __slots__ = ()

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in ("u1", b"u1", "uint8"):
            raise pickle.UnpicklingError(f"refused: an array of dtype {name!r}, expected uint8")

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and alignment: a byte has none."""


class _Array:
    """Stands for a numpy array of uint8."""

    __slots__ = ("data",)

    def __init__(self, *_: Any) -> None:
        self.data = b""

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("refused: an array that isn't of uint8")
        self.data = data


class _ArrayFromBuffer(_Array):
    """Stands for what protocol 5 makes an array by."""

    __slots__ = ()

    def __init__(self, data: Any, dtype: Any, *_: Any) -> None:
        super().__init__()
        self.__setstate__((1, None, dtype, False, bytes(data) if isinstance(data, bytearray) else data))


class _Latin1:
    """Stands for `_codecs.encode`, by which protocol 2 writes bytes as a string of latin-1."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("refused: expected bytes as latin1")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        """Do nothing: there are no instances."""


_STAND_INS: dict[str, type | None] = {
    "_codecs.encode": _Latin1,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": None,  # only ever an argument of _reconstruct
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _STAND_INS |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.numeric._frombuffer": _ArrayFromBuffer}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _STAND_INS:
            raise pickle.UnpicklingError(f"refused: it asks for {name}, expected lists, bools, bytes and uint8 arrays")
        return _STAND_INS[name]


def _bytes_of(image: Any) -> bytes | None:
    data = getattr(image, "data", None) if isinstance(image, _Array) else image  # unset if made without __init__
    return data if isinstance(data, bytes) else None
