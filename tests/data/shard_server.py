"""A folder over real HTTP on loopback, with faults on demand, and a record of what was asked for."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit


class Fault(NamedTuple):
    """What goes wrong with one answer."""

    kind: Literal["status", "hang", "close", "flip", "slow", "wait"]
    value: int = 0
    """The status, or the bytes that are sent before; `wait` sends the rest once `go_on` of the server is set."""


class ShardServer(ThreadingHTTPServer):
    """`faults[name]` are used up, one an answer; `always[name]` stays."""

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.asked: list[tuple[str, int]] = []
        """Name and first byte of each request."""
        self.authorizations: list[str | None] = []
        self.go_on = threading.Event()
        self.ending = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/faces/shards"

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


@contextmanager
def serve(folder: Path, *, ranges: bool = True) -> Iterator[ShardServer]:
    with ShardServer(folder, ranges=ranges) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ending.set()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        server, name = self.server, urlsplit(self.path).path.rpartition("/")[2]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        server.asked.append((name, start))
        server.authorizations.append(self.headers.get("Authorization"))
        fault = server.faults[name].pop(0) if server.faults[name] else server.always.get(name)
        path = server.folder / name
        if fault is not None and fault.kind == "status":
            self.send_error(fault.value)
        elif not path.is_file() or not self.path.startswith("/faces/shards/"):
            self.send_error(404)
        else:
            self._send(path.read_bytes(), start if server.ranges else 0, fault)

    def do_HEAD(self) -> None:
        """As S3 is asked before an object is read."""
        path = self.server.folder / urlsplit(self.path).path.rpartition("/")[2]
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()

    def _send(self, data: bytes, start: int, fault: Fault | None) -> None:
        if start and start >= len(data):
            self.send_error(416)
            return
        if fault is not None and fault.kind == "flip":
            data = bytearray(data)
            data[fault.value] ^= 1
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:]
        if fault is None or fault.kind == "flip":
            self.wfile.write(rest)
            return
        self.wfile.write(rest[: fault.value])
        self.wfile.flush()
        if fault.kind == "hang":
            self.server.ending.wait(20)
        elif fault.kind in ("slow", "wait"):
            self.server.go_on.wait(1 if fault.kind == "slow" else 60)
            self.wfile.write(rest[fault.value :])

    def log_message(self, *args: object) -> None:
        pass
