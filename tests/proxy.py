"""A TCP proxy that delays, stalls, refuses and drops, in front of a server that knows nothing of it."""

import socket
import socketserver
import threading
import time
from contextlib import suppress
from typing import Literal


class TcpProxy(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of this machine; how well, its attributes say at any time."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.port = int(self.server_address[1])
        self.target_port = target_port
        self.mode: Literal["pass", "stall", "refuse"] = "pass"
        """stall: bytes wait in both directions; refuse: new connections are closed at once."""
        self.delay_s = 0.0
        """Seconds that each piece waits, in each direction."""
        self.num_lost = 0
        """Answers that are still to be dropped, each with its connection."""
        self._open: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()
        self.drop()

    def drop(self) -> None:
        """End every connection that is open."""
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def pass_on(self, source: socket.socket, target: socket.socket, *, is_answer: bool) -> None:
        """Pass bytes on until either side ends."""
        self._open |= {source, target}
        try:
            while data := source.recv(65536):
                if is_answer and self.num_lost > 0:
                    self.num_lost -= 1
                    return
                time.sleep(self.delay_s)
                while self.mode == "stall":
                    time.sleep(0.05)
                target.sendall(data)
        except OSError:
            pass
        finally:
            self._open -= {source, target}
            for one in (source, target):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


class _Connection(socketserver.BaseRequestHandler):
    server: TcpProxy

    def handle(self) -> None:
        if self.server.mode == "refuse":
            return
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.server.target_port)) as target:
            answers = {"target": self.server.pass_on, "args": (target, self.request), "kwargs": {"is_answer": True}}
            thread = threading.Thread(**answers, daemon=True)
            thread.start()
            self.server.pass_on(self.request, target, is_answer=False)
            thread.join()
