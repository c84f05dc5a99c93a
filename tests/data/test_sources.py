"""Faces as people keep them: folders, tars, and what is wrong with them."""

import io
import multiprocessing
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from drawn_faces import FaceFolder, drawn_image, encoded, tar_of

from facetrain.data.index import FileSlices, index_tar
from facetrain.data.shards import sha256_of
from facetrain.data.sources import FaceSource, open_faces


def contents(source: FaceSource) -> dict[str, bytes]:
    return {name: source.read(i) for i, name in enumerate(source.names)}


def add_member(tar: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, len(data) if kind == tarfile.REGTYPE else 0, "elsewhere"
    tar.addfile(member, io.BytesIO(data))


def test_folder_and_tar_of_it_are_the_same_faces(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Bo": 2, "Ann": 1, "Ann_Z": 1})
    for source in (open_faces([folder]), open_faces([tar_of(folder, tmp_path / "faces.tar")])):
        assert source.names == ("Ann/000.jpg", "Ann_Z/000.jpg", "Bo/000.jpg", "Bo/001.jpg")
        assert source.identities == ("Ann", "Ann_Z", "Bo", "Bo")
        assert contents(source) == {name: (folder / name).read_bytes() for name in source.names}
        assert source.fingerprint() == open_faces([folder]).fingerprint()
        assert "Bo/001.jpg" in source.where(3)


def test_several_tars_are_one_set_though_an_identity_is_in_two(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Ann": 1, "Bo": 2})
    first = tar_of(folder, tmp_path / "a.tar")
    (folder / "Bo" / "000.jpg").rename(folder / "Bo" / "007.jpg")
    (folder / "Bo" / "001.jpg").unlink()
    (folder / "Ann" / "000.jpg").unlink()
    source = open_faces([first, folder])
    assert source.names == ("Ann/000.jpg", "Bo/000.jpg", "Bo/001.jpg", "Bo/007.jpg")
    assert source.read(1) == source.read(3)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_tar_format(face_folder: FaceFolder, tmp_path: Path, format: int) -> None:
    # ustar splits at a slash; 90 bytes a part fit into it, the other two have records of their own for any length.
    long = "N" * (90 if format == tarfile.USTAR_FORMAT else 180)
    folder = face_folder({long: 2, "Zoë": 1})
    path = tar_of(folder, tmp_path / "long.tar", format=format, arcname="lfw/" + "d" * 20)
    source = open_faces([path])
    assert source.identities == (long, long, "Zoë")
    assert contents(source) == {name: (folder / name).read_bytes() for name in source.names}
    with tarfile.open(path) as tar:
        assert [member.name for member in index_tar(path) if member.is_file] == [m.name for m in tar if m.isfile()]


def test_a_size_beyond_octal_digits_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add_member(tar, "Ann/1.jpg", b"abc")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    (tmp_path / "a.tar").write_bytes(data)
    assert [member.size_bytes for member in index_tar(tmp_path / "a.tar")] == [3]


def test_tars_joined_end_to_end_are_read_to_the_last(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Ann": 1})
    one = tar_of(folder, tmp_path / "one.tar").read_bytes()
    (folder / "Ann").rename(folder / "Bo")
    (tmp_path / "both.tar").write_bytes(one + tar_of(folder, tmp_path / "two.tar").read_bytes())
    assert open_faces([tmp_path / "both.tar"]).identities == ("Ann", "Bo")


def test_hidden_and_other_files_are_passed_over(face_folder: FaceFolder) -> None:
    folder = face_folder({"Ann": 1})
    for name in (".DS_Store", "Ann/._000.jpg", "Ann/notes.txt", "__MACOSX/000.jpg", ".cache/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "Ann" / "001.PNG").write_bytes(encoded(drawn_image(9), ".png"))
    source = open_faces([folder])
    assert source.names == ("Ann/000.jpg", "Ann/001.PNG")
    assert source.skipped == ()


def test_images_of_other_kinds_are_listed(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Ann": 2})
    (folder / "Ann/000.jpg").rename(folder / "Ann/000.JFIF")
    (folder / "Ann/001.jpg").rename(folder / "Ann/001.jpe")
    (folder / "Bo").mkdir()
    for name in ("Ann/2.tif", "Bo/1.HEIC", "Bo/notes.txt", "Bo/.hidden.gif", "Bo/1.json"):
        (folder / name).write_bytes(b"x")
    for path in (folder, tar_of(folder, tmp_path / "a.tar")):
        source = open_faces([path])
        assert source.names == ("Ann/000.JFIF", "Ann/001.jpe")
        assert [(image.name, image.reason.split(", ")[0]) for image in source.skipped] == [
            ("Ann/2.tif", "unread kind: .tif"),
            ("Bo/1.HEIC", "unread kind: .heic"),
        ]


def test_images_in_the_wrong_place_are_listed(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"lfw/Ann": 2, "lfw/Bo": 2})
    for name in ("cover.jpg", "lfw/cover.jpg", "lfw/Ann/deeper/x.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "lfw/Ann/link.jpg").symlink_to("nowhere")
    (folder / "lfw/Bo/circle").symlink_to("..")
    (folder / "lfw/Bo" / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    source = open_faces([folder])
    assert source.names == ("Ann/000.jpg", "Ann/001.jpg", "Bo/000.jpg", "Bo/001.jpg")
    assert source.read(0) == (folder / "lfw/Ann/000.jpg").read_bytes()
    assert {image.name: image.reason.split(":")[0] for image in source.skipped} == dict.fromkeys(
        ["cover.jpg", "lfw/Ann/deeper/x.jpg", "lfw/Ann/link.jpg", "lfw/Bo/\\udcff.jpg", "lfw/cover.jpg"], "bad name"
    )


def test_links_in_a_tar_are_listed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "Ann/1.jpg")
        add_member(tar, "Ann/2.jpg", kind=tarfile.LNKTYPE)
        add_member(tar, "Ann/3.jpg", kind=tarfile.SYMTYPE)
    source = open_faces([tmp_path / "a.tar"])
    assert source.names == ("Ann/1.jpg",)
    assert [image.name for image in source.skipped] == ["Ann/2.jpg", "Ann/3.jpg"]


@pytest.mark.parametrize("name", ["../Ann/1.jpg", "/Ann/1.jpg", "Ann/../../1.jpg"])
def test_a_name_that_leaves_the_tar_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, name)
    with pytest.raises(ValueError, match=r"a\.tar: refused: member '.*1\.jpg' points outside"):
        open_faces([tmp_path / "a.tar"])


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder, tar, "):
        open_faces([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no faces given"):
        open_faces([])
    with pytest.raises(ValueError, match=f"{tmp_path}: no images in it: expected IDENTITY/IMAGE"):
        open_faces([tmp_path])
    (tmp_path / "1.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no images in it: .* found '1\.jpg'"):
        open_faces([tmp_path])
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ValueError, match=r"empty\.tar: "):
        open_faces([tmp_path / "empty.tar"])


def test_a_layout_without_identities_is_no_set_of_faces(face_folder: FaceFolder) -> None:
    folder = face_folder({"Ann/video1": 2, "Bo/video1": 2, "Cy/video1": 2})
    with pytest.raises(ValueError, match=r"no images in it: expected IDENTITY/IMAGE .* found '.*/video1/"):
        open_faces([folder])


def test_an_image_that_occurs_twice_is_named(face_folder: FaceFolder, tmp_path: Path) -> None:
    folder = face_folder({"Ann": 1, "Bo": 2})
    with pytest.raises(ValueError, match=r"Ann/000\.jpg: occurs 2 times, in .*faces and .*a\.tar"):
        open_faces([folder, tar_of(folder, tmp_path / "a.tar")])


def test_a_truncated_tar_is_named(face_folder: FaceFolder, tmp_path: Path) -> None:
    path = tar_of(face_folder({"Ann": 2}), tmp_path / "a.tar")
    last = list(index_tar(path))[-1]
    # Within the last image, right after it, and within the header before it.
    for end in (last.offset + 1, last.offset + -(-last.size_bytes // 512) * 512, last.offset - 100):
        (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:end])
        with pytest.raises(ValueError, match=r"cut\.tar: truncated tar"):
            open_faces([tmp_path / "cut.tar"])


def test_a_long_pax_header_takes_no_time_and_an_endless_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    record = b"6 a=b\n"
    with tarfile.open(path, "w") as tar:
        add_member(tar, "header", record * 150_000, kind=tarfile.REGTYPE)
        add_member(tar, "Ann/1.jpg")
    data = bytearray(path.read_bytes())
    data[156:157] = b"x"
    path.write_bytes(data)
    begin_s = time.process_time()
    assert [member.name for member in index_tar(path)] == ["Ann/1.jpg"]
    assert time.process_time() - begin_s < 2  # a walk that copies the rest at each record takes many times that
    with tarfile.open(path, "w") as tar:
        add_member(tar, "header", record * 175_000)
    data = bytearray(path.read_bytes())
    for kind in (b"x", b"L"):
        data[156:157] = kind
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar: damaged tar header at byte 0: 1,050,000 bytes of header"):
            list(index_tar(path))


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(os.urandom(5000))
    with pytest.raises(ValueError, match=r"a\.tar: expected an uncompressed tar"):
        open_faces([tmp_path / "a.tar"])
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        add_member(tar, "Ann/1.jpg", os.urandom(5000))
    with pytest.raises(ValueError, match=r"a\.tar: expected an uncompressed tar"):
        open_faces([tmp_path / "a.tar"])


def test_a_file_that_changes_size_is_named(face_folder: FaceFolder) -> None:
    folder = face_folder({"Ann": 1})
    source = open_faces([folder])
    (folder / "Ann/000.jpg").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"000\.jpg: changed while it was in use"):
        source.read(0)


def test_a_file_that_the_disk_cannot_read_is_named(tmp_path: Path) -> None:
    bad = Path("/proc/self/mem")  # its first byte is an input/output error, as on a bad disk
    (tmp_path / "Ann").mkdir()
    (tmp_path / "Ann/1.jpg").symlink_to(bad)
    with pytest.raises(OSError, match=r"Input/output error: '.*/Ann/1\.jpg'$"):
        open_faces([tmp_path]).read(0)
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'$"):
        FileSlices([bad]).read(0, 0, 10)
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'$"):
        sha256_of(bad)


@pytest.mark.parametrize(("offset", "size_bytes"), [(1 << 63, 10), (0, 1 << 62)])
def test_a_place_that_no_file_has_is_of_a_damaged_index(tmp_path: Path, offset: int, size_bytes: int) -> None:
    (tmp_path / "a.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=rf"a\.tar: its index places {size_bytes} bytes at byte {offset}"):
        FileSlices([tmp_path / "a.tar"]).read(0, offset, size_bytes)


def test_threads_forks_and_pickles_read_the_same(face_folder: FaceFolder, tmp_path: Path) -> None:
    source = open_faces([tar_of(face_folder({"Ann": 20, "Bo": 20}), tmp_path / "a.tar")])
    expected = contents(source)
    order = list(range(len(source.names))) * 20
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(source.read, order)) == [expected[source.names[i]] for i in order]
    with multiprocessing.get_context("fork").Pool(2) as forks:
        assert forks.map(source.read, order[:80]) == [expected[source.names[i]] for i in order[:80]]
    assert contents(pickle.loads(pickle.dumps(source))) == expected
