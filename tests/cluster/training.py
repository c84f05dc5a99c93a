"""A training under launch/torchrun.sh, as its user sees it: what it says and when; and its processes, to do harm to."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
from cluster.hosts import Host
from commands import ROOT
from mlflow_server import free_port

_STEP = re.compile(r"step +(\d+)/\d+ ")


@dataclass(frozen=True)
class Line:
    """A line that a machine's launcher or processes wrote."""

    at: float
    node: int
    text: str

    @property
    def step(self) -> int | None:
        """The step that it reports; None where it is another line."""
        found = _STEP.search(self.text)
        return int(found[1]) if found else None


class Training:
    """One job; used as a context, which leaves no process behind."""

    def __init__(
        self,
        settings: Mapping[str, object],
        *,
        hosts: Sequence[Host | None] = (None,),
        nodes: str = "",
        processes: int = 1,
        ports: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            settings: Flags of the training, by key.
            hosts: Where each node runs; None is this machine.
            nodes: NNODES, if not the number of hosts.
            processes: Processes of each node.
            ports: The port at which each node finds the others, if not the same.
            env: Further variables.
        """
        self.run_dir = Path(str(settings["run.dir"]))
        self.hosts = hosts
        self.lines: list[Line] = []
        self._words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        self._processes, self._nodes = processes, nodes or str(len(hosts))
        self._ports = ports or [free_port()] * len(hosts)
        self._env = env or {}
        self._launchers: dict[int, psutil.Popen] = {}
        self._readers: list[threading.Thread] = []
        self._news = threading.Condition()

    def __enter__(self) -> "Training":
        for node in range(len(self.hosts)):
            self.start(node)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for node in self._launchers:
            self.kill_node(node)
        for process in psutil.process_iter():  # those whose torchrun was killed are nobody's children
            with suppress(psutil.Error):
                if str(self.run_dir) in process.cmdline():
                    process.kill()
        for reader in self._readers:
            reader.join(10)

    def start(self, node: int = 0) -> None:
        """Start a node's launcher."""
        host = self.hosts[node]
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--nproc-per-node", str(self._processes)]
        command += ["--", *self._words]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FACETRAIN_VENV": sys.prefix}
        env |= {"NNODES": self._nodes, "NODE_RANK": str(node), "MASTER_PORT": str(self._ports[node]), **self._env}
        env["MASTER_ADDR"] = "localhost" if self.hosts[0] is None else self.hosts[0].address
        launcher = psutil.Popen(
            command if host is None else host.command(command),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._launchers[node] = launcher
        self._readers.append(threading.Thread(target=self._read, args=(node, launcher), daemon=True))
        self._readers[-1].start()

    def _read(self, node: int, launcher: psutil.Popen) -> None:
        for text in launcher.stdout:
            with self._news:
                self.lines.append(Line(time.monotonic(), node, text.rstrip()))
                self._news.notify_all()

    def wait_for(self, pattern: str, *, after: float = 0.0, timeout_s: float = 600.0) -> Line:
        """Wait for a line, from a moment of the monotonic clock on."""
        give_up_at = time.monotonic() + timeout_s
        with self._news:
            while True:
                for line in self.lines:
                    if line.at >= after and re.search(pattern, line.text):
                        return line
                assert time.monotonic() < give_up_at, f"no '{pattern}' in {timeout_s:g} s:\n{self.said()}"
                self._news.wait(0.2)

    def wait_for_step(self, step: int) -> Line:
        """Wait until a step is reported."""
        return self.wait_for(rf"step +{step}/")

    def wait_until_ended(self, *, timeout_s: float = 600.0, nodes: Sequence[int] | None = None) -> list[int]:
        """Wait for the launchers and return their exit codes."""
        give_up_at = time.monotonic() + timeout_s
        codes = []
        for node in self._launchers if nodes is None else nodes:
            try:
                codes.append(self._launchers[node].wait(max(0.1, give_up_at - time.monotonic())))
            except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
                raise AssertionError(f"node {node} still runs after {timeout_s:g} s:\n{self.said()}") from None
        for reader in self._readers:
            reader.join(2)
        return codes

    def said(self) -> str:
        """Return all lines."""
        return "\n".join(f"{line.at:.1f} {line.node}: {line.text}" for line in self.lines)

    def launcher(self, node: int = 0) -> psutil.Popen:
        """Return a node's launch script."""
        return self._launchers[node]

    def agent(self, node: int = 0) -> psutil.Process:
        """Return the torchrun of a node."""
        (found,) = [one for one in self._of(node) if "torch.distributed.run" in one.cmdline()]
        return found

    def worker(self, node: int = 0) -> psutil.Process:
        """Return the last training process of a node."""
        return [one for one in self._of(node) if self._is_worker(one)][-1]

    def kill_node(self, node: int) -> None:
        """End all processes of a node at once, without warning."""
        for process in self._of(node):
            process.kill()
        self._launchers[node].wait()

    def _of(self, node: int) -> list[psutil.Process]:
        launcher = self._launchers[node]
        return [launcher, *launcher.children(recursive=True)] if launcher.is_running() else []

    @staticmethod
    def _is_worker(process: psutil.Process) -> bool:
        words = process.cmdline()
        return "facetrain.train" in words and "torch.distributed.run" not in words
