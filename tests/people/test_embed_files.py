"""`facetrain embed`: sources, unreadable images, interruption, ranks."""

import errno
import io
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run as run_command
from safetensors.torch import load_file, save_file

import facetrain
from facetrain import embed_files
from facetrain.cli import main
from facetrain.data.images import ImageSet, open_images
from facetrain.data.sources import open_faces
from facetrain.evaluation.embeddings_npz import load_embeddings_npz, network_of_embeddings
from facetrain.models.onnx_backbone import OnnxInput
from facetrain.networks import EmbedOptions, Photographs, embed_readable, network_sha256, open_network
from facetrain.world import World, start_world


def embed(*words: str | Path) -> None:
    main(["embed", "--device", "cpu", *map(str, words)])


@pytest.fixture
def pictures(synthetic: Path, tmp_path: Path) -> Path:
    """A folder of photos: two of them deep in it, and one that is none."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, path in enumerate(sorted((synthetic / "faces" / "heldout").rglob("*.jpg"))[:5]):
        shutil.copy(path, folder / ("deep/er" if number < 2 else "") / f"{number}.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_every_image_below_a_folder_is_embedded_as_the_python_interface_does(
    pictures: Path, run: Path, tmp_path: Path
) -> None:
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "e.npz")
    names, embeddings = load_embeddings_npz(tmp_path / "e.npz")
    assert names == ("2.jpg", "3.jpg", "4.jpg", "deep/er/0.jpg", "deep/er/1.jpg")
    expected = facetrain.load(run).embed([pictures / name for name in names])
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npz", "pictures"]


def test_tars_lists_files_and_stdin_hold_the_same_images(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(pictures, ".")
    (tmp_path / "list.txt").write_text("pictures/3.jpg\n\npictures/deep/er/1.jpg\n")
    monkeypatch.chdir(tmp_path)
    in_tar, in_list = open_images([tmp_path / "p.tar"]), open_images([tmp_path / "list.txt"])
    assert in_tar.names == tuple(f"./{name}" for name in open_images([pictures]).names)
    assert in_list.names == ("pictures/3.jpg", "pictures/deep/er/1.jpg")
    content = (pictures / "3.jpg").read_bytes()
    assert in_tar.read(1) == in_list.read(0) == open_images([pictures / "3.jpg"]).read(0) == content
    assert open_images([], ["pictures/3.jpg"]).read(0) == content


def test_an_image_of_a_kind_that_is_not_read_is_an_unreadable_one(pictures: Path, tmp_path: Path) -> None:
    (pictures / "5.tif").write_bytes(b"x")
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(pictures, ".")
    for path in (pictures, tmp_path / "p.tar"):
        images = open_images([path])
        assert len(images.names) == 6
        with pytest.raises(ValueError, match=r"5\.tif: unread kind: \.tif, expected \.jpg, "):
            images.read(3)
    with pytest.raises(ValueError, match=r"5\.tif: no images in it .*, found '.*5\.tif'"):
        open_images([pictures / "5.tif"])


def test_a_file_that_cannot_be_opened_is_an_unreadable_image(pictures: Path, run: Path, tmp_path: Path) -> None:
    faces = open_faces([pictures / "deep"])
    (pictures / "deep" / "er" / "1.jpg").unlink()
    options = EmbedOptions(device="cpu")
    network = open_network(run, options.onnx)
    with start_world("cpu", 60) as world:
        _, unreadable, failed = embed_readable(network, Photographs(faces, None), [0, 1], options, world)
    assert unreadable == {1: "er/1.jpg: No such file or directory"}
    assert failed == {1}


def test_links_in_circles_are_walked_once(pictures: Path) -> None:
    (pictures / "self").symlink_to(".")
    (pictures / "deep" / "up").symlink_to("..")
    for one, other in ("ab", "ba"):
        (pictures / one).mkdir()
        (pictures / one / "to").symlink_to(Path("..", other))
    assert open_images([pictures]).names == ("2.jpg", "3.jpg", "4.jpg", "deep/er/0.jpg", "deep/er/1.jpg")


def test_a_folder_that_cannot_be_read_is_no_empty_folder(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = os.scandir

    def scandir(path: Path | str) -> "os._ScandirIterator[str]":
        if Path(path).name == "er":  # chmod would not stop root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="deep/er"):
        open_images([pictures])


def test_images_that_cannot_be_read_are_listed_and_left_out(
    pictures: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "3.jpg").write_bytes(b"no image")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{pictures}/2.jpg\n{pictures}/3.jpg\n{pictures}/gone.jpg\n"))
    embed("-", "--checkpoint", run, "--out", tmp_path / "e.npz")
    names, _ = load_embeddings_npz(tmp_path / "e.npz")
    assert names == (f"{pictures}/2.jpg",)
    first, second = (tmp_path / "e.npz.left_out.txt").read_text().splitlines()
    assert first.startswith(f"{pictures}/3.jpg\t")
    assert "expected an image" in first
    assert second == f"{pictures}/gone.jpg\t{pictures}/gone.jpg: No such file or directory"
    assert "images left out: 2 of 3" in capsys.readouterr().out


def test_a_part_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(descriptor: int) -> None:
        raise OSError(errno.EIO, os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match=r"part-000000\.npz\.\d+\.tmp"):
        embed_files._write_part(tmp_path / "part-000000.npz", np.zeros((1, 2), np.float32), {}, (), set())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_job_goes_on_and_ends_as_if_it_had_not_been(
    pictures: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed_files, "PART_IMAGES", 2)
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "whole.npz")
    parts, write = [], embed_files._write_part

    def write_and_die(file: Path, *rest: object) -> None:
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(file.name)
        write(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(embed_files, "_write_part", write_and_die)
    with pytest.raises(SystemExit, match="130"):
        embed(pictures, "--checkpoint", run, "--out", tmp_path / "cut.npz")
    assert capsys.readouterr().err.endswith("facetrain: interrupted\n")
    torch.distributed.destroy_process_group()  # as the end of the process does
    assert not (tmp_path / "cut.npz").exists()
    assert len(parts) == 2
    parts.clear()
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "cut.npz")
    assert parts == ["part-000002.npz"]
    names, embeddings = load_embeddings_npz(tmp_path / "cut.npz")
    whole_names, whole = load_embeddings_npz(tmp_path / "whole.npz")
    assert names == whole_names
    np.testing.assert_array_equal(embeddings, whole)


def test_what_the_system_failed_to_read_is_tried_again_by_the_next_start(
    pictures: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(images: ImageSet, image: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(ImageSet, "read", out_of_reach)
        with pytest.raises(SystemExit, match="2"):
            embed(pictures, "--checkpoint", run, "--out", tmp_path / "e.npz")
    torch.distributed.destroy_process_group()  # as the end of the process does
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "e.npz")
    assert len(load_embeddings_npz(tmp_path / "e.npz")[0]) == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("e.npz")) == ["e.npz"]


def test_parts_of_another_job_are_not_taken(
    pictures: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "e.npz.parts"
    parts.mkdir()
    (parts / "plan.json").write_text("{}")
    (parts / "part-000000.npz").write_bytes(b"of another job")
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "e.npz")
    assert "starts anew" in capsys.readouterr().out
    assert len(load_embeddings_npz(tmp_path / "e.npz")[0]) == 5


def test_parquet_holds_names_and_embeddings(pictures: Path, run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "e.npz")
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "e.parquet")
    names, embeddings = load_embeddings_npz(tmp_path / "e.npz")
    table = parquet.read_table(tmp_path / "e.parquet")
    assert tuple(table["name"].to_pylist()) == names
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), embeddings)


def test_the_file_names_the_weights_that_were_read_where_the_run_has_others_by_then(
    pictures: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, write = shutil.copytree(run, tmp_path / "run"), embed_files._write_part
    of_read = network_sha256(trained)

    def train_on_and_write(*args: object) -> None:
        weights = load_file(trained / "model.safetensors")
        save_file({name: 2 * tensor for name, tensor in weights.items()}, trained / "model.safetensors")
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(embed_files, "_write_part", train_on_and_write)
    embed(pictures, "--checkpoint", trained, "--out", tmp_path / "e.npz")
    assert network_of_embeddings(tmp_path / "e.npz") == of_read
    assert network_sha256(trained) != of_read


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "e.csv"], "--out: expected a file .npz or .parquet"),
        (["nowhere", "--out", "e.npz"], "nowhere: no such folder"),
        (["--out", "folder.npz"], "--out: expected a file, folder.npz is a folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path,
    pictures: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.npz").mkdir()
    with pytest.raises(SystemExit) as end:
        embed(pictures, *words, "--checkpoint", run)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


class OtherWeights(World):
    """A world whose other rank has opened a later checkpoint."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, "of a later checkpoint"]


def test_ranks_that_read_different_weights_are_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"run\d*: changed while it was opened; give the model\.safetensors of one"):
        open_network(run, OnnxInput()).fitting_batch(OtherWeights())


@pytest.mark.slow
def test_two_ranks_write_what_one_does(pictures: Path, run: Path, tmp_path: Path) -> None:
    embed(pictures, "--checkpoint", run, "--out", tmp_path / "one.npz")
    (pictures / "9.jpg").write_bytes(b"no image")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("embed", pictures, "--device", "cpu", "--checkpoint", run, "--out", tmp_path / "two.npz")
    done = run_command(*launcher, "-m", "facetrain", *words)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        load_embeddings_npz(tmp_path / "one.npz")[1], load_embeddings_npz(tmp_path / "two.npz")[1]
    )
    assert "9.jpg" in (tmp_path / "two.npz.left_out.txt").read_text()


def test_what_is_joined_is_as_numpy_writes_it_and_a_part_lists_its_own_photographs_alone(
    pictures: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed_files, "PART_IMAGES", 2)
    points = tmp_path / "points.txt"
    points.write_text("2.jpg 38 51 73 51 56 71 41 92 70 92\n")
    listed, write = [], embed_files._write_part

    def write_and_look(*args: object) -> None:
        listed.append(args[3])
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(embed_files, "_write_part", write_and_look)
    embed(pictures, "--checkpoint", run, "--landmarks", points, "--out", tmp_path / "e.npz")
    names, embeddings = load_embeddings_npz(tmp_path / "e.npz")
    assert network_of_embeddings(tmp_path / "e.npz") == network_sha256(run)
    missed = [name for name in names if name != "2.jpg"]
    assert (tmp_path / "e.npz.not_found.txt").read_text().splitlines() == missed
    assert listed == [tuple(name for name in names[part : part + 2] if name != "2.jpg") for part in (0, 2, 4)]
    listed_in = f"listed in {tmp_path}/e.npz.not_found.txt"
    assert f"faces not found, centre taken instead: 4, {listed_in}" in capsys.readouterr().out
    sha256 = np.array(network_sha256(run))
    np.savez(tmp_path / "numpy.npz", names=np.array(names), embeddings=embeddings, network_sha256=sha256)
    for file in ("e.npz", "numpy.npz"):
        with zipfile.ZipFile(tmp_path / file) as archive:
            assert archive.testzip() is None
    with zipfile.ZipFile(tmp_path / "e.npz") as ours, zipfile.ZipFile(tmp_path / "numpy.npz") as numpys:
        assert {name: ours.read(name) for name in ours.namelist()} == {
            name: numpys.read(name) for name in numpys.namelist()
        }
