"""A real SLURM on this machine: munge, slurmctld and two slurmd, started here and stopped by their process ids."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster.debian import missing_programs

_CONFIG = """\
ClusterName=facetrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=20
MinJobAge=3600
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs={cpus} RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=off
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster of two nodes."""

    config: Path
    environment: dict[str, str]
    nodes: dict[str, "subprocess.Popen[bytes]"]
    """The slurmd of each node."""

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        command = ["slurmd", "-D", "-N", name]
        self.nodes[name] = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)

    def kill_node(self, name: str) -> None:
        """End all processes of a node at once, without warning: its slurmd, and what it runs of jobs."""
        _kill(self.nodes[name])
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ()
                if env.get("SLURMD_NODENAME") == name and env.get("SLURM_CONF") == str(self.config):
                    keeper = process.parent()
                    if keeper is not None and keeper.name().startswith("slurmstepd"):
                        keeper.kill()
                    process.kill()

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a SLURM command and return what it printed."""
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, such as PENDING, RUNNING or COMPLETED."""
        fields = dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)
        return fields["JobState"]

    def wait(self, job: str, *states: str, timeout_s: float = 600.0) -> str:
        """Wait until a job is in one of the states."""
        give_up_at = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < give_up_at, f"job {job} is {state} after {timeout_s} s, expected {states}"
            time.sleep(0.2)
        return state

    def wait_for_nodes(self) -> None:
        """Wait until no node has anything left of a job."""
        give_up_at = time.monotonic() + 120
        while True:
            command = ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.stdout.split() == ["idle", "idle"]:
                return
            assert time.monotonic() < give_up_at, done.stdout + done.stderr
            time.sleep(0.2)

    def start_again(self, job: str, *, after_s: int = 2) -> None:
        """Let a requeued job start, which SLURM lets wait for two minutes, and wait until it has.

        Not in the second of its end: nodes then take the new start for the one that was revoked, and refuse it.
        """
        self.wait(job, "PENDING")
        self.wait_for_nodes()
        self.run("scontrol", "update", f"jobid={job}", f"StartTime=now+{after_s}")
        self.wait(job, "RUNNING", "COMPLETED", "FAILED")


def missing_program() -> str:
    """Return why no cluster can be started here; empty if one can. As root on Debian, what is missing is installed."""
    if os.geteuid() != 0:
        return "starting SLURM needs root"
    return missing_programs(["slurmctld", "munged"], ["slurm-wlm", "munge"])


@contextmanager
def start_slurm(folder: Path) -> Iterator[Slurm]:
    """Start two nodes on loopback below `folder`, and stop all of it at the end."""
    host = socket.gethostname()
    port, port1, port2 = _free_ports(3)
    config = folder / "slurm.conf"
    fields = {"host": host, "folder": folder, "port": port, "port1": port1, "port2": port2, "cpus": os.cpu_count()}
    config.write_text(_CONFIG.format(**fields))
    (folder / "state").mkdir()
    environment = {**os.environ, "SLURM_CONF": str(config), "OMP_NUM_THREADS": "1"}
    daemons: list[subprocess.Popen[bytes]] = []
    slurm = Slurm(config, environment, {})
    try:
        _start_munge(folder, daemons)
        daemons.append(subprocess.Popen(["slurmctld", "-D", "-c", "-i"], env=environment, stderr=subprocess.DEVNULL))
        for name in ("n1", "n2"):
            slurm.start_node(name)
        slurm.wait_for_nodes()
        yield slurm
    finally:
        for name in slurm.nodes:
            slurm.kill_node(name)
        for daemon in reversed(daemons):
            _kill(daemon)


def _kill(daemon: "subprocess.Popen[bytes]") -> None:
    """End a daemon and what it started."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(daemon.pid).children(recursive=True):
            process.kill()
    daemon.kill()
    daemon.wait()


def _start_munge(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    options = [f"--{name}={path}" for name, path in files.items()]
    daemons.append(subprocess.Popen(["munged", "--foreground", "--force", *options], stderr=subprocess.DEVNULL))
    give_up_at = time.monotonic() + 20
    while not files["socket"].exists():
        assert time.monotonic() < give_up_at, (folder / "munge.log").read_text()
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
