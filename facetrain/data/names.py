"""Names of millions of identities, mapped into memory and decoded one at a time."""

import codecs
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt


class NameList(Sequence[str]):
    """Names as they lie in a file: UTF-8, with a NUL between two, which no file system allows in a name.

    As Python strings two million names would take 130 MB of each process; nearly none of them is ever asked for.
    """

    def __init__(self, text: npt.NDArray[np.uint8]) -> None:
        """Take the bytes of at least one name."""
        self.text = text
        """uint8, as it is in the file."""
        self._length = len(text) - int(np.count_nonzero(text)) + 1

    @classmethod
    def of(cls, names: Sequence[str]) -> "NameList":
        """Join names that exist as strings."""
        return cls(np.frombuffer("\0".join(names).encode(), dtype=np.uint8))

    def check(self) -> None:
        """Decode all names once, a piece at a time.

        Raises:
            ValueError: They aren't UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        for begin in range(0, len(self.text), 1 << 20):
            decoder.decode(bytes(self.text[begin : begin + (1 << 20)]))
        decoder.decode(b"", final=True)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, item: int) -> str: ...

    @overload
    def __getitem__(self, item: slice) -> list[str]: ...

    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        row = range(len(self))[item]
        begin = int(self._nuls[row - 1]) + 1 if row else 0
        end = int(self._nuls[row]) if row < len(self) - 1 else len(self.text)
        return bytes(self.text[begin:end]).decode()

    def __iter__(self) -> Iterator[str]:
        yield from bytes(self.text).decode().split("\0")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _nuls(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.text == 0)
