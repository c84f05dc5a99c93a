"""Faces in Parquet: a column of image files and a column of labels, as Hugging Face's sets have them."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from facetrain.data.sources.faces import LABEL_KEYS, Face, Found, SkippedImage, label_fault

_ROWS_AT_ONCE = 256
"""Rows in memory while the images are moved to the spool."""


@dataclass(frozen=True)
class Spool:
    """Images of a Parquet file in a temporary file without a name; the place of one is its offset in bytes.

    Parquet compresses thousands of images together and can't give a single one, but an identity's images may lie
    anywhere. The file goes away with the process, however that ends.
    """

    path: Path
    """The Parquet file, for messages."""
    file: IO[bytes]
    """The images, end to end."""

    def read(self, place: int, size_bytes: int) -> bytes:
        """Return an image."""
        return os.pread(self.file.fileno(), size_bytes, place)

    def where(self, place: int, name: str) -> str:
        """Return the Parquet file and the image's name."""
        return f"{self.path}: {name}"


def open_parquet(path: Path, spool_dir: Path | None) -> Found:
    """Find the images of a Parquet file, and copy them to where single ones can be read.

    The image column is the one of bytes, or of structs with a field `bytes`; the label column is called `identity`,
    `label`, `class` or `cls`, and has integers, floats that are whole numbers, or text, in a dictionary or not. An
    image is called `LABEL/FILE_ROW`.

    Args:
        path: The file.
        spool_dir: Folder with room for all of its images, while the set is in use; null takes the system's.

    Raises:
        ValueError: The file is damaged or lacks such columns, or pyarrow isn't installed; the message names it.
    """
    # Not closed here: it lives as long as the set.
    spool = Spool(path, tempfile.TemporaryFile(dir=spool_dir))  # noqa: SIM115
    faces, skipped, offset = list[Face](), list[SkippedImage](), 0
    for row, (image, label) in enumerate(_rows(path)):
        identity, fault = _identity(label)
        fault = fault or (None if image is not None else "no bytes: the row has no image")
        name = f"{path.stem}_{row:08d}"
        if fault or image is None:
            skipped.append(SkippedImage(name, fault or ""))
            continue
        faces.append(Face(identity, f"{identity}/{name}", offset, len(image)))
        spool.file.write(image)
        offset += len(image)
    spool.file.flush()
    if not faces:
        raise ValueError(f"{path}: no images in it: {skipped[0].reason if skipped else 'it has no rows'}")
    return Found(faces, skipped, spool)


def _rows(path: Path) -> Iterator[tuple[bytes | None, Any]]:
    """Yield image and label of each row."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'facetrain[parquet]'") from None
    try:
        with ParquetFile(path) as table:
            image, label = _columns(path, table.schema_arrow)
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[image, label]):
                images = batch.column(image)
                if pyarrow.types.is_struct(images.type):
                    images = images.field("bytes")
                yield from zip(images.to_pylist(), batch.column(label).to_pylist(), strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: can't be read as Parquet: {' '.join(str(error).split())}") from None


def _identity(label: int | float | str | None) -> tuple[str, str | None]:
    """Return a row's identity, and why it can't be one; a table with rows that lack a label has 3.0 for 3."""
    if label is None:
        return "", "bad label: the row has none"
    if isinstance(label, float):
        if not label.is_integer():
            return "", f"bad label: expected a whole number or text, got {label:g}"
        label = int(label)
    return str(label), label_fault(str(label))


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    """Return the names of the image and the label column."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_image(kind: Any) -> bool:
        return is_bytes(kind) or (types.is_struct(kind) and any(f.name == "bytes" and is_bytes(f.type) for f in kind))

    images = [field.name for field in schema if is_image(field.type)]
    label = next((key for key in LABEL_KEYS if key in schema.names), None)
    if len(images) != 1 or label is None or label in images:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"{path}: expected one column of image bytes and one called label or identity, found {found}")
    kind = schema.field(label).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not any(
        is_kind(value) for is_kind in (types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    ):
        raise ValueError(f"{path}: expected a column '{label}' of integers or text, found {kind}")
    return images[0], label
