"""Files of a folder that lies elsewhere: on http(s), behind a command, or on any file system that fsspec knows.

http is read with the standard library: curl, as webdataset calls it, can't resume and waits for ever on a server that
hangs; fsspec's http needs aiohttp.
"""

import hashlib
import logging
import os
import random
import select
import shlex
import signal
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from facetrain.masking import mask_secrets

log = logging.getLogger(__name__)

READ_BYTES = 1 << 18
"""Bytes of one read, at most."""

_MAX_PAUSE_S = 30.0
# A server asks to come back later by these; every other 4xx says that it won't help.
_PASSING_4XX = (408, 425, 429)

Blocks = Generator[tuple[int, bytes], None, None]
"""Pieces of a file, each with the byte at which it begins."""


@dataclass(frozen=True, kw_only=True)
class RemoteFolder:
    """A folder of files elsewhere; safe over threads and forks, and can be pickled."""

    url: str
    """Such as `https://host/shards`, `s3://bucket/shards`, or `pipe:` and a shell command that writes the file {name}
    to stdout, from byte {start} on where the command has that too."""
    timeout_s: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""
    attempts: int = 6
    """Tries in a row that may bring nothing; a broken download goes on where it broke."""
    pause_s: float = 0.5
    """Pause after the first failure, doubled after each further one, less a random part."""

    def url_of(self, name: str) -> str:
        """Return where a file is; for `pipe:` with {start} still in it."""
        if self.url.startswith("pipe:"):
            return self.url.replace("{name}", shlex.quote(name))
        parts = urlsplit(self.url)  # keeps the query of a signed URL at its end
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def shown(self, name: str) -> str:
        """Return where a file is, or the folder for '', for messages: without password and signature."""
        url = self.url_of(name) if name else self.url
        if url.startswith("pipe:"):
            return mask_secrets(url)
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))

    def download(self, name: str, fd: int, *, size_bytes: int | None = None, sha256: str | None = None) -> None:
        """Bring a file into an open one, which may hold its beginning already.

        Args:
            name: The file.
            fd: Open for reading and writing; holds the whole file afterwards.
            size_bytes: What its size must be; None takes what comes.
            sha256: What its checksum must be; None takes what comes. A file with another is dropped and fetched again.

        Raises:
            ValueError: It can't be had, or isn't what it must be; one line that names the URL.
        """
        failures, reached = 0, os.fstat(fd).st_size
        while True:
            problem = self._try(name, fd, size_bytes, sha256)
            if problem is None:
                return
            length = os.fstat(fd).st_size
            # A server that breaks off again and again is fine as long as each connection brings more of the file.
            failures = 1 if length > reached else failures + 1
            reached = max(reached, length)
            if failures >= self.attempts:
                raise ValueError(f"{self.shown(name)}: {problem} ({self.attempts} attempts)")
            log.warning(f"{self.shown(name)}: {problem}; attempt {failures} of {self.attempts}, at byte {length}")
            pause_s = min(_MAX_PAUSE_S, self.pause_s * 2 ** (failures - 1))
            time.sleep(random.SystemRandom().uniform(pause_s / 2, pause_s))  # or all nodes would come back together

    def _try(self, name: str, fd: int, size_bytes: int | None, sha256: str | None) -> str | None:
        """Fetch what is missing; returns what went wrong and may go well next time."""
        if size_bytes is None or os.fstat(fd).st_size != size_bytes:
            try:
                self._fetch(name, fd, size_bytes)
            except (OSError, HTTPException, UnicodeError, _NotWrittenError) as error:
                if _is_final(error):
                    raise ValueError(f"{self.shown(name)}: {_reason(error)}") from None
                if isinstance(error, HTTPError) and error.code == 416:  # the file here is longer than the one there
                    os.ftruncate(fd, 0)
                return _reason(error)
        length = os.fstat(fd).st_size
        if size_bytes is not None and length < size_bytes:
            return f"expected {size_bytes} bytes, it ended after {length}"
        problem = None
        if size_bytes is not None and length > size_bytes:
            problem = f"expected {size_bytes} bytes, it has more"
        elif sha256 is not None and (found := _sha256_of(fd)) != sha256:
            problem = f"expected the manifest's sha256 {sha256[:16]}..., got {found[:16]}..."
        if problem is not None:
            os.ftruncate(fd, 0)
        return problem

    def _fetch(self, name: str, fd: int, size_bytes: int | None) -> None:
        """Append to the file from its end on, or from 0 where the other side can't begin elsewhere."""
        # Without a known size, what is there may be the beginning of another version.
        start = os.fstat(fd).st_size if size_bytes is not None else 0
        os.ftruncate(fd, start)
        with closing(_read_from(self.url_of(name), start, self.timeout_s)) as blocks:
            for at, block in blocks:
                if at == 0 and start > 0:
                    os.ftruncate(fd, 0)
                _write(fd, block, at)
                if size_bytes is not None and at + len(block) > size_bytes:
                    return


def _read_from(url: str, start_byte: int, timeout_s: float) -> Blocks:
    """Yield a file from `start_byte` on, or from 0 where that can't be had."""
    if url.startswith("pipe:"):
        return _read_pipe(url.removeprefix("pipe:"), start_byte, timeout_s)
    if url.startswith(("http://", "https://")):
        return _read_http(url, start_byte, timeout_s)
    return _read_fsspec(url, start_byte)


def _read_http(url: str, start_byte: int, timeout_s: float) -> Blocks:
    # Some servers turn the library's own agent away.
    headers = {"User-Agent": "facetrain"} | ({"Range": f"bytes={start_byte}-"} if start_byte else {})
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
    if user:  # sent to no other host that the server may point to
        request.add_unredirected_header("Authorization", f"Basic {b64encode(unquote(user).encode()).decode()}")
    with urlopen(request, timeout=timeout_s) as response:
        at = start_byte if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        end = None if length is None else at + int(length)
        while block := response.read1(READ_BYTES):
            yield at, block
            at += len(block)
        if end is not None and at != end:
            raise ConnectionError(f"the connection was closed at byte {at} of {end}")


def _read_pipe(command: str, start_byte: int, timeout_s: float) -> Blocks:
    at = start_byte if "{start}" in command else 0
    command = command.replace("{start}", str(at))
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,  # ssh would take what a script or terminal has for those who come after
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        fd, poll = process.stdout.fileno(), select.poll()
        poll.register(fd, select.POLLIN)
        try:
            while True:
                if not poll.poll(1000 * timeout_s):
                    raise TimeoutError(f"no byte in {timeout_s:g} s")
                block = os.read(fd, READ_BYTES)
                if not block:
                    break
                yield at, block
                at += len(block)
            if process.wait(timeout_s) != 0:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise OSError(f"exit code {process.returncode}{': ' + said[-1] if said else ''}")
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the command didn't end in {timeout_s:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _read_fsspec(url: str, start_byte: int) -> Blocks:
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the protocol's package is missing, or there is no such protocol
        raise ValueError(f"data.shards: {url.partition('://')[0]}://: {error}") from None
    try:
        with file_system.open(path, "rb") as file:
            file.seek(start_byte)
            at = start_byte
            while block := file.read(READ_BYTES):
                yield at, block
                at += len(block)
    except OSError:
        raise
    except Exception as error:  # each file system raises its own
        raise OSError(f"{type(error).__name__}: {error}") from None


class _NotWrittenError(Exception):
    """This side failed, so that trying again is useless."""


def _write(fd: int, block: bytes, at: int) -> None:
    try:
        written = os.pwrite(fd, block, at)
        while written < len(block):  # a disk that is nearly full takes a part, and fails at the next
            written += os.pwrite(fd, block[written:], at + written)
    except OSError as error:
        raise _NotWrittenError(f"can't be written to data.cache_dir: {error.strerror}") from None


def _is_final(error: Exception) -> bool:
    """Return whether trying again is useless."""
    if isinstance(error, HTTPError):
        return 400 <= error.code < 500 and error.code not in (*_PASSING_4XX, 416)
    final = FileNotFoundError | PermissionError | IsADirectoryError | InvalidURL | UnicodeError | _NotWrittenError
    return isinstance(error, final)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):  # of an address: what is sent is ASCII
        return f"expected an address in ASCII, other letters as %XX: {error}"
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _sha256_of(fd: int) -> str:
    digest, at = hashlib.sha256(), 0
    while block := os.pread(fd, 1 << 20, at):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()
