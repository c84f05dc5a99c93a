import os
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from facetrain.data.verification_bin import read_verification_bin

IMAGES = [b"\xff\xd8one", b"\xff\xd8two", b"three", b"\x00four"]


def write(file: Path, content: Any, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    return file


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bytes", "arrays"])
def test_every_protocol_is_read(tmp_path: Path, protocol: int, kind: str) -> None:
    images = IMAGES if kind == "bytes" else [np.frombuffer(data, np.uint8) for data in IMAGES]
    content = read_verification_bin(write(tmp_path / "v.bin", (images, [True, False]), protocol))
    assert content.images == tuple(IMAGES)
    assert content.is_genuine.tolist() == [True, False]


def test_strings_of_python_2_are_bytes(tmp_path: Path) -> None:
    # cPickle.dumps((["\xffa", "b"], [True]), 2) as Python 2 writes it
    (tmp_path / "v.bin").write_bytes(b"\x80\x02]q\x01(U\x02\xffaq\x02U\x01bq\x03e]q\x04\x88a\x86q\x05.")
    assert read_verification_bin(tmp_path / "v.bin").images == (b"\xffa", b"b")


@pytest.mark.parametrize(
    ("place", "name"),
    [("image", "posix.system"), ("bool", "posix.system"), ("whole", "posix.system"), ("image", "builtins.exec")],
)
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, place: str, name: str) -> None:
    mark = tmp_path / "mark"
    if name == "builtins.exec":
        bad = Malicious(exec, f"open({str(mark)!r}, 'w')")
    else:
        bad = Malicious(os.system, f"touch {mark}")
    content = {"image": ([bad, b"b"], [True]), "bool": ([b"a", b"b"], [bad]), "whole": bad}[place]
    file = write(tmp_path / "v.bin", content)
    with pytest.raises(ValueError, match=rf"v\.bin: not an InsightFace .*refused: it asks for {name}"):
        read_verification_bin(file)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"cnumpy\nndarray\n(I9\ntR.", "not callable"),
        (b"cnumpy.core.multiarray\nscalar\n(tR.", r"numpy\.core\.multiarray\.scalar"),
        (b"c_codecs\ndecode\n(tR.", r"_codecs\.decode"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.", "expected bytes as latin1"),
        (b"\x80\x04\x8c\x0bnumpy.dtype\x8c\x04newb\x93.", r"numpy\.dtype\.newb"),
        (b"cnumpy\ndtype.__init__.__globals__\n.", r"numpy\.dtype\.__init__"),
        (b"Pfile\n.", "persistent"),
        (b"\x82\x01.", "extension"),
        (b"c_codecs\nencode\n(N}X\x05\x00\x00\x00wronglNstb.", "not support item assignment"),
    ],
)
def test_other_ways_to_call_something_are_refused(tmp_path: Path, code: bytes, name: str) -> None:
    (tmp_path / "v.bin").write_bytes(code)
    with pytest.raises(ValueError, match=rf"v\.bin: not an InsightFace verification file: .*{name}"):
        read_verification_bin(tmp_path / "v.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (([np.zeros(3, np.float32), b"b"], [True]), "refused: an array of dtype 'f4', expected uint8"),
        (([np.array([b"a"], dtype=object), b"b"], [True]), "refused: an array of dtype"),
        ((["text", b"b"], [True]), "image 0: expected bytes, got str"),
        (([b"a", None], [True]), "image 1: expected bytes, got NoneType"),
        (([b"a", b"b"], [1]), "pair 0: expected a bool, got int"),
        (([b"a", b"b", b"c"], [True]), "expected two images for each bool, got 3 and 1"),
        (([], []), "expected two images for each bool, got 0 and 0"),
        ([b"a", b"b"], "expected a list of images and a list of bools, got list"),
        ({"images": []}, "expected a list of images and a list of bools, got dict"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"v.bin: .*{message}"):
        read_verification_bin(write(tmp_path / "v.bin", content))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    whole = pickle.dumps((IMAGES * 20, [True, False] * 20))
    (tmp_path / "v.bin").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"v\.bin: not an InsightFace verification file"):
        read_verification_bin(tmp_path / "v.bin")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_verification_bin(tmp_path / "nowhere.bin")


@pytest.mark.parametrize(("name", "num_pairs", "num_genuine"), [("small_lfw", 10, 10), ("lfw_600pairs", 600, 300)])
def test_insightfaces_files_are_read(face_data: Path, name: str, num_pairs: int, num_genuine: int) -> None:
    content = read_verification_bin(face_data / "interop" / f"{name}.bin")
    assert (len(content.images), len(content.is_genuine)) == (2 * num_pairs, num_pairs)
    assert content.is_genuine.sum() == num_genuine
    image = cv2.imdecode(np.frombuffer(content.images[-1], np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (112, 112, 3)
