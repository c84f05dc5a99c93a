"""Files from elsewhere, and what goes wrong on the way: all over real HTTP or real commands."""

import hashlib
import os
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_server import Fault, ShardServer, serve

from facetrain.data.remote import RemoteFolder

DATA = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.tar").write_bytes(DATA)
    return tmp_path / "there"


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with serve(folder) as running:
        yield running


def remote_of(url: str, *, attempts: int = 3, timeout_s: float = 10.0) -> RemoteFolder:
    return RemoteFolder(url=url, timeout_s=timeout_s, attempts=attempts, pause_s=0.01)


def download(url: str, path: Path, *, size_bytes: int | None = len(DATA), **patience: float) -> bytes:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        remote_of(url, **patience).download("a.tar", fd, size_bytes=size_bytes, sha256=SHA256)
    finally:
        os.close(fd)
    return path.read_bytes()


def test_a_file_arrives_whole(server: ShardServer, tmp_path: Path) -> None:
    assert download(server.url, tmp_path / "a") == DATA
    assert download(server.url + "/", tmp_path / "b", size_bytes=None) == DATA
    assert server.asked == [("a.tar", 0)] * 2


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_passing_errors_of_a_server_are_tried_again(server: ShardServer, tmp_path: Path, status: int) -> None:
    server.faults["a.tar"] = [Fault("status", status), Fault("status", status)]
    assert download(server.url, tmp_path / "a") == DATA
    assert len(server.asked) == 3


def test_errors_that_stay_are_named_after_so_many_attempts(server: ShardServer, tmp_path: Path) -> None:
    server.always["a.tar"] = Fault("status", 500)
    with pytest.raises(ValueError, match=rf"^{server.url}/a\.tar: the server answered 500 [^\n]*\(3 attempts\)$"):
        download(server.url, tmp_path / "a")
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [404, 403])
def test_what_is_not_there_is_not_asked_for_again(server: ShardServer, tmp_path: Path, status: int) -> None:
    server.always["a.tar"] = Fault("status", status)
    with pytest.raises(ValueError, match=rf"^{server.url}/a\.tar: the server answered {status} [^\n]*$"):
        download(server.url, tmp_path / "a")
    assert len(server.asked) == 1


def test_a_server_that_hangs_is_left_and_the_download_goes_on(server: ShardServer, tmp_path: Path) -> None:
    server.faults["a.tar"] = [Fault("hang", 0), Fault("hang", 100_000)]
    started_at = time.monotonic()
    assert download(server.url, tmp_path / "a", timeout_s=1) == DATA
    assert 2 < time.monotonic() - started_at < 10  # the server would take 20 s for each
    assert server.asked == [("a.tar", 0), ("a.tar", 0), ("a.tar", 100_000)]


def test_a_broken_download_goes_on_where_it_broke(server: ShardServer, tmp_path: Path) -> None:
    server.always["a.tar"] = Fault("close", 50_000)  # each connection brings something, so that two attempts do
    assert download(server.url, tmp_path / "a", attempts=2) == DATA
    assert server.asked == [("a.tar", start) for start in range(0, 300_000, 50_000)]


def test_a_server_without_ranges_sends_it_all_again(folder: Path, tmp_path: Path) -> None:
    with serve(folder, ranges=False) as server:
        server.faults["a.tar"] = [Fault("close", 200_000), Fault("close", 100_000)]
        assert download(server.url, tmp_path / "a") == DATA
        server.always["a.tar"] = Fault("close", 200_000)
        with pytest.raises(ValueError, match="the connection was closed at byte 200000 of 300000"):
            download(server.url, tmp_path / "b")


def test_wrong_bytes_are_fetched_again_and_then_refused(server: ShardServer, tmp_path: Path) -> None:
    server.faults["a.tar"] = [Fault("flip", 123_456)]
    assert download(server.url, tmp_path / "a") == DATA
    server.always["a.tar"] = Fault("flip", 123_456)
    with pytest.raises(ValueError, match=rf"a\.tar: expected the manifest's sha256 {SHA256[:16]}\.\.\., got [0-9a-f]"):
        download(server.url, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b""
    assert server.asked == [("a.tar", 0)] * 5


def test_a_beginning_that_is_not_of_this_file_is_dropped(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    assert download(server.url, tmp_path / "a") == DATA
    (tmp_path / "b").write_bytes(bytes(400_000))
    assert download(server.url, tmp_path / "b") == DATA


def test_a_file_that_is_shorter_or_longer_than_it_must_be_is_named(server: ShardServer, tmp_path: Path) -> None:
    for size_bytes, problem in ((300_001, "it ended after 300000|Requested Range"), (299_999, "it has more")):
        with pytest.raises(ValueError, match=rf"a\.tar: [^\n]*({problem})[^\n]*\(3 attempts\)$"):
            download(server.url, tmp_path / "a", size_bytes=size_bytes)


def test_user_and_password_of_the_url_are_sent_as_the_standard_says(server: ShardServer, tmp_path: Path) -> None:
    url = server.url.replace("://", "://me:p%40ss@")
    assert download(url, tmp_path / "a") == DATA
    assert server.authorizations == ["Basic " + b64encode(b"me:p@ss").decode()]
    with pytest.raises(ValueError, match=r"^http://host:port/a\.tar: [^\n]*'port'"):
        download("http://me:secret@host:port", tmp_path / "b")


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^http://127\.0\.0\.1:9/a\.tar: [^\n]*refused \(3 attempts\)$"):
        download("http://127.0.0.1:9", tmp_path / "a")


def test_an_address_with_other_letters_than_those_of_ascii_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^http://127\.0\.0\.1:9/öl/a\.tar: expected an address in ASCII, .* %XX: "):
        download("http://127.0.0.1:9/öl", tmp_path / "a")


def test_a_command_writes_the_file(folder: Path, tmp_path: Path) -> None:
    assert download(f"pipe:cat {folder}/{{name}}", tmp_path / "a") == DATA
    (tmp_path / "log").touch()
    # The first time it breaks off; then it is asked for the rest.
    command = f"echo {{start}} >> {tmp_path}/log; tail -c +$(({{start}} + 1)) {folder}/{{name}} | head -c 200000"
    assert download(f"pipe:{command}", tmp_path / "b") == DATA
    assert (tmp_path / "log").read_text().split() == ["0", "200000"]


def test_a_command_leaves_standard_input_to_the_script_around_it(folder: Path, tmp_path: Path) -> None:
    before = os.dup(0)
    (tmp_path / "script").write_text("the lines to come")
    with open(tmp_path / "script") as script:
        os.dup2(script.fileno(), 0)
        try:
            assert download(f"pipe:cat > {tmp_path}/taken; cat {folder}/{{name}}", tmp_path / "a") == DATA
        finally:
            os.dup2(before, 0)
            os.close(before)
    assert (tmp_path / "taken").read_text() == ""


def test_a_command_that_fails_or_hangs_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^pipe:.*: exit code 1: cat: .*No such file.* \(3 attempts\)$"):
        download(f"pipe:LC_ALL=C cat {folder}/no-{{name}}", tmp_path / "a")
    started_at = time.monotonic()
    with pytest.raises(ValueError, match=r"no byte in 0\.3 s \(2 attempts\)$"):
        download("pipe:sleep 20 # {name}", tmp_path / "a", attempts=2, timeout_s=0.3)
    assert time.monotonic() - started_at < 10


def test_what_fsspec_opens_is_read(folder: Path, tmp_path: Path) -> None:
    import fsspec

    assert download(f"file://{folder}", tmp_path / "a") == DATA
    with fsspec.open("memory://bucket/shards/a.tar", "wb") as file:
        file.write(DATA)
    (tmp_path / "b").write_bytes(DATA[:1000])
    assert download("memory://bucket/shards", tmp_path / "b") == DATA
    with pytest.raises(ValueError, match=r"^memory://nowhere/a\.tar: [^\n]+$"):
        download("memory://nowhere", tmp_path / "c")
    with pytest.raises(ValueError, match=r"^data\.shards: gopher://: Protocol not known: gopher"):
        download("gopher://host/shards", tmp_path / "c")


def test_s3_is_read_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with serve(folder) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.removesuffix("/faces/shards"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        (tmp_path / "a").write_bytes(DATA[:1000])
        assert download("s3://faces/shards", tmp_path / "a") == DATA
        assert server.asked == [("a.tar", 1000)]
        server.always["a.tar"] = Fault("status", 403)
        with pytest.raises(ValueError, match=r"^s3://faces/shards/a\.tar: [^\n]+$"):
            download("s3://faces/shards", tmp_path / "b")


def test_messages_hold_no_password_and_no_signature() -> None:
    remote = remote_of("https://me:secret@host:8080/shards/?signature=abc")
    assert remote.url_of("a.tar") == "https://me:secret@host:8080/shards/a.tar?signature=abc"
    assert remote.shown("a.tar") == "https://host:8080/shards/a.tar"
    assert remote.shown("") == "https://host:8080/shards/"
    assert remote_of("pipe:cat shards/{name}").shown("") == "pipe:cat shards/{name}"
    command = remote_of("pipe:curl -u me:secret https://host/{name}")
    assert command.shown("a.tar") == "pipe:curl -u *** https://host/a.tar"
