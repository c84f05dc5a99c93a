"""Two hosts on this machine: network namespaces with names of their own, joined by a pair of virtual interfaces."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.debian import missing_programs


@dataclass(frozen=True)
class Host:
    """A host; its file system and processes are those of the machine, its network isn't."""

    name: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the words that run a command there, in the process that is started."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *named, *words]

    def set_link(self, state: str) -> None:
        """Let the cable be pulled out, `down`, or in, `up`; neither end is told more than its own interface shows."""
        _ip("-n", self.name, "link", "set", "link0", state)


def missing_network() -> str:
    """Return why there can be no such hosts here; empty if there can. As root on Debian, iproute2 is installed."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if reason := missing_programs(["ip"], ["iproute2"]):
        return reason
    probe = f"facetrain-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespaces here ({done.stderr.strip()})"
    _ip("netns", "del", probe)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make both, and remove them at the end."""
    hosts = Host(f"ft{os.getpid()}a", "10.77.0.1"), Host(f"ft{os.getpid()}b", "10.77.0.2")
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            of_host = Path("/etc/netns", host.name)
            of_host.mkdir(parents=True)
            (of_host / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        ends = ["link0", "netns", hosts[0].name, "type", "veth", "peer", "name", "link0", "netns", hosts[1].name]
        _ip("link", "add", *ends)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "link0")
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.set_link("up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False)
            shutil.rmtree(Path("/etc/netns", host.name), ignore_errors=True)
        with suppress(OSError):
            Path("/etc/netns").rmdir()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
