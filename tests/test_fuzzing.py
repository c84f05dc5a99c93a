"""Bytes from outside, valid ones damaged at random and random ones: every reader raises ValueError or reads them.

No other error, and no code run from a pickle.
"""

import io
import json
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facetrain.command_line import config_yaml, parse_config
from facetrain.config import Config
from facetrain.data.align import points_from_file
from facetrain.data.index import index_tar
from facetrain.data.manifest import MANIFEST_FILE, Manifest
from facetrain.data.shards import ShardSet
from facetrain.data.sources.csv_list import open_csv
from facetrain.data.sources.opening import open_faces
from facetrain.data.sources.recordio import open_records
from facetrain.data.verification_bin import read_verification_bin
from facetrain.evaluation.embeddings_npz import load_embeddings_npz
from facetrain.evaluation.groups import read_groups
from facetrain.evaluation.inputs import face_set, read_development_pairs, read_images, read_pairs, read_people
from facetrain.evaluation.threshold import threshold_from_results
from facetrain.gallery import GALLERY_FILE, Gallery

FACES = face_set(["Ann_0001", "Ann_0002", "Bob_0001", "Bob_0002"])
JPEG = b"\xff\xd8\xff\xe0 not much of a JPEG \xff\xd9"


def a_tar() -> bytes:
    """PAX, GNU long names and plain members."""
    parts = []
    for form, name in (
        (tarfile.PAX_FORMAT, "Zoë/" + "x" * 120 + ".jpg"),
        (tarfile.GNU_FORMAT, "Ann/" + "y" * 150 + ".jpg"),
    ):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(JPEG)
            tar.addfile(info, io.BytesIO(JPEG))
            label = tarfile.TarInfo(name.replace(".jpg", ".json"))
            label.size = 12
            tar.addfile(label, io.BytesIO(b'{"label": 3}'))
        parts.append(stream.getvalue())
    return b"".join(parts)


def a_record(flag: int, label: bytes, number: int, data: bytes) -> bytes:
    content = struct.pack("<IfQQ", flag, struct.unpack("<f", label)[0], number, 0) + data
    padding = b"\0" * (-len(content) % 4)
    return struct.pack("<II", 0xCED7230A, len(content)) + content + padding


def records() -> bytes:
    zero, one = struct.pack("<f", 0), struct.pack("<f", 1)
    head = struct.pack("<ff", 3, 4)
    return a_record(2, zero, 0, head) + a_record(0, zero, 1, JPEG) + a_record(0, one, 2, JPEG)


def an_npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


EMBEDDINGS = an_npz(names=np.array(FACES.names), embeddings=np.eye(4, dtype=np.float32))
BIN = pickle.dumps(([JPEG, np.frombuffer(JPEG, np.uint8)] * 2, [True, False]), protocol=2)
PAIRS = b"1 1\nAnn 1 2\nAnn 1 Bob 1\n"

READERS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {  # no bytes: those of the packed shards
    "tar index": ("a.tar", a_tar(), lambda file: list(index_tar(file))),
    "tar of faces": ("a.tar", a_tar(), lambda file: open_faces([file])),
    "record reader": ("train.rec", records(), open_records),
    "verification file": ("a.bin", BIN, read_verification_bin),
    "pairs": ("pairs.txt", PAIRS, lambda file: read_pairs(file).rows(FACES)),
    "development pairs": ("p.txt", b"1\nAnn 1 2\nAnn 1 Bob 1\n", read_development_pairs),
    "list of images": ("images.txt", b"Ann_0001\nBob_0002\n", lambda file: read_images(file, FACES)),
    "list of people": ("people.txt", b"Ann\nBob\n", lambda file: read_people(file, FACES)),
    "list of groups": ("groups.csv", b"person,sex\nAnn,f\nBob,m\n", lambda file: read_groups(file, FACES)),
    "list of points": ("points.txt", b"Ann/Ann_0001.jpg 1 2 3 4 5 6 7 8 9 10\n", points_from_file),
    "list of faces": ("faces.csv", b"path,label\nfaces.csv,Ann\n", open_csv),
    "embeddings": ("e.npz", EMBEDDINGS, load_embeddings_npz),
    "manifest": (MANIFEST_FILE, b"", lambda file: Manifest.load(file.parent).sha256),
    "results": (
        "r.json",
        b'{"thresholds": {"open-counts/all": {"1e-2": 0.5}}}',
        lambda f: threshold_from_results(f, 0.01),
    ),
}


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Some random bytes in place of others, here and there, or a cut; seldom bytes that were never valid."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


many = pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.slow)])
"""Of damaged files; derandomised, so that a failure comes again."""


def fuzz(examples: int, valid: bytes, read: Callable[[bytes], object]) -> None:
    """Give damaged files to a reader; ValueError is documented, and a user reads its message."""

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damaged(valid))
    def check(data: bytes) -> None:
        with suppress(ValueError):
            read(data)

    check()


@pytest.fixture
def valid_and_read(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[bytes, Callable[[bytes], object]]:
    """What a reader takes, and the reader of such bytes."""
    file, valid, reader = READERS[name]
    valid = valid or (request.getfixturevalue("synthetic") / "shards" / file).read_bytes()
    (tmp_path / "train.idx").write_text("0\t0\n1\t40\n2\t100\n")  # read beside train.rec

    def read(data: bytes) -> object:
        (tmp_path / file).write_bytes(data)
        return reader(tmp_path / file)

    return valid, read


@many
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(
    valid_and_read: tuple[bytes, Callable[[bytes], object]], examples: int
) -> None:
    fuzz(examples, *valid_and_read)


@pytest.mark.parametrize("name", READERS)
def test_what_is_damaged_there_was_valid(valid_and_read: tuple[bytes, Callable[[bytes], object]]) -> None:
    valid, read = valid_and_read
    read(valid)


def with_each_replaced(content: Any, value: Any) -> Iterator[Any]:
    """Copies of JSON in each of which one value, at any depth, is another."""
    yield value
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in items:
        for other in with_each_replaced(inner, value):
            changed = content.copy()
            changed[key] = other
            yield changed


def test_shards_whose_manifest_has_any_value_replaced_are_opened_or_refused(synthetic: Path, tmp_path: Path) -> None:
    """Bytes damaged at random are seldom JSON still."""
    folder = shutil.copytree(synthetic / "shards", tmp_path / "shards")
    valid = json.loads((folder / MANIFEST_FILE).read_text())
    num_opened = 0
    for value in (None, True, -1, 1.5, float("nan"), 10**30, "", "x\0", "\ud800", [], [1], {}, {"a": 1}):
        for content in with_each_replaced(valid, value):
            (folder / MANIFEST_FILE).write_text(json.dumps(content))
            with suppress(ValueError):
                opened = ShardSet.open(folder).manifest
                num_opened += 1
                assert opened.single_image_identities >= 0  # as `facetrain inspect` takes for granted
    assert num_opened > 50  # past what reads the manifest: its packer, say, may be any


@many
def test_damaged_configs_are_read_or_refused(tmp_path: Path, examples: int) -> None:
    def read(data: bytes) -> object:
        (tmp_path / "c.yaml").write_bytes(data)
        return parse_config(["--config", str(tmp_path / "c.yaml")], "facetrain")

    fuzz(examples // 4, config_yaml(Config()).encode(), read)


@many
def test_damaged_galleries_are_read_or_refused(tmp_path: Path, examples: int) -> None:
    Gallery().with_images(FACES.names, ["A", "A", "B", "B"], np.eye(4, dtype=np.float32), [JPEG] * 4).save(tmp_path)

    def read(data: bytes) -> object:
        (tmp_path / GALLERY_FILE).write_bytes(data)
        return Gallery.load(tmp_path)

    fuzz(examples, (tmp_path / GALLERY_FILE).read_bytes(), read)
