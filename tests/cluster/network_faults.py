"""Faults of processes, machines and the network between them.

Each starts a training, does it harm at some step, and says how it came through. test_faults.py runs each;
benchmarks/faults.py makes the table of docs/reliability.md.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.hosts import two_hosts
from cluster.measure import STEPS, STRIKE_AT, TIMEOUT_S, Bench, Outcome, outcome, same_weights, strike
from cluster.training import Training
from mlflow_server import free_port
from proxy import TcpProxy


@contextmanager
def on_two_hosts(bench: Bench, name: str, *, nodes: str = "2", **more: object) -> Iterator[Training]:
    """Start a training of two ranks on two hosts, and let it come to the step of the fault."""
    with two_hosts() as hosts, Training(bench.settings(name, **more), hosts=hosts, nodes=nodes) as training:
        training.wait_for_step(STRIKE_AT)
        yield training


def worker_killed(bench: Bench) -> Outcome:
    """kill -9 of a rank."""
    with on_two_hosts(bench, "worker_killed") as training:
        struck_at = strike(training, training.worker(1).kill)
        return outcome(training, struck_at, "lost rank 1 on", bench.undisturbed())


def worker_stopped(bench: Bench) -> Outcome:
    """SIGSTOP of a rank."""
    with on_two_hosts(bench, "worker_stopped") as training:
        struck_at = strike(training, training.worker(1).suspend)
        return outcome(training, struck_at, "rank 1 on .*no sign of life", bench.undisturbed())


def node_lost(bench: Bench) -> Outcome:
    """A machine is gone without a word; 20 s later it is back, and the same command is started there."""
    with on_two_hosts(bench, "node_lost") as training:
        training.hosts[1].set_link("down")
        struck_at = strike(training, lambda: training.kill_node(1))
        time.sleep(20)
        training.hosts[1].set_link("up")
        training.start(1)
        return outcome(training, struck_at, "lost rank 1 on", bench.undisturbed())


def node_lost_for_good(bench: Bench) -> Outcome:
    """A machine is gone for good; NNODES=1:2."""
    with on_two_hosts(bench, "node_lost_for_good", nodes="1:2", train__keep_checkpoints=STEPS) as training:
        training.hosts[1].set_link("down")
        struck_at = strike(training, lambda: training.kill_node(1))
        training.wait_for("continues at step", after=struck_at)
        training.wait_until_ended(nodes=[0])
        return outcome(training, struck_at, "lost rank 1 on", fewer_ranks_from_there(bench, training), nodes=[0])


def link_down_for_good(bench: Bench) -> Outcome:
    """The link is cut for good; NNODES=1:2."""
    with on_two_hosts(bench, "link_down_for_good", nodes="1:2", train__keep_checkpoints=STEPS) as training:
        struck_at = strike(training, lambda: training.hosts[1].set_link("down"))
        training.wait_for("continues at step", after=struck_at)
        training.wait_until_ended(nodes=[0])
        return outcome(training, struck_at, "lost rank 1 on", fewer_ranks_from_there(bench, training), nodes=[0])


def fewer_ranks_from_there(bench: Bench, training: Training) -> Path:
    """Return a run of one rank, undisturbed, from the checkpoint with which a training went on alone.

    Up to there nothing had happened to it, so that the run is that of any other fault at the same step.
    """
    continued = next(line for line in training.lines if "continues at step" in line.text)
    checkpoint = Path(continued.text.split()[-1])
    name = f"alone_from_{checkpoint.name}"
    run_dir = bench.folder / name
    if not (run_dir / "results.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(checkpoint, run_dir / "checkpoints" / checkpoint.name)
        shutil.copy(training.run_dir / "config.yaml", run_dir)
        with Training(bench.settings(name)) as alone:
            assert alone.wait_until_ended() == [0], alone.said()
        assert not same_weights(run_dir, bench.undisturbed())  # other sums are rounded otherwise
    return run_dir


def rendezvous_host_killed(bench: Bench) -> Outcome:
    """kill -9 of the torchrun on machine 0, where all meet."""
    with on_two_hosts(bench, "rendezvous_host_killed") as training:
        struck_at = strike(training, training.agent(0).kill)
        return outcome(training, struck_at, "torchrun lost the other machines", bench.undisturbed())


def link_down_shortly(bench: Bench) -> Outcome:
    """The link is cut for 5 s, half of `run.timeout_s`."""
    with on_two_hosts(bench, "link_down_shortly") as training:
        struck_at = strike(training, lambda: training.hosts[1].set_link("down"))
        time.sleep(TIMEOUT_S / 2)
        training.hosts[1].set_link("up")
        return outcome(training, struck_at, "", bench.undisturbed())


def link_down_for_a_while(bench: Bench) -> Outcome:
    """The link is cut for 31 s, three times `run.timeout_s`."""
    with on_two_hosts(bench, "link_down_for_a_while") as training:
        struck_at = strike(training, lambda: training.hosts[1].set_link("down"))
        time.sleep(3 * TIMEOUT_S + 1)
        training.hosts[1].set_link("up")
        return outcome(training, struck_at, "lost rank [01] on", bench.undisturbed())


@contextmanager
def behind_a_proxy(bench: Bench, name: str) -> Iterator[tuple[Training, TcpProxy]]:
    """Two launchers on this machine; the second meets the first through a proxy."""
    port = free_port()
    with TcpProxy(port) as proxy:
        settings = bench.settings(name)
        with Training(settings, hosts=[None, None], ports=[port, proxy.port]) as training:
            training.wait_for_step(STRIKE_AT)
            yield training, proxy


def rendezvous_delayed(bench: Bench) -> Outcome:
    """Every message between the launchers takes 300 ms longer."""
    with behind_a_proxy(bench, "rendezvous_delayed") as (training, proxy):
        struck_at = strike(training, lambda: setattr(proxy, "delay_s", 0.3))
        return outcome(training, struck_at, "", bench.undisturbed())


def rendezvous_stalled(bench: Bench) -> Outcome:
    """Nothing passes between the launchers for 5 s."""
    with behind_a_proxy(bench, "rendezvous_stalled") as (training, proxy):
        struck_at = strike(training, lambda: setattr(proxy, "mode", "stall"))
        time.sleep(5)
        proxy.mode = "pass"
        return outcome(training, struck_at, "", bench.undisturbed())


def rendezvous_dropped(bench: Bench) -> Outcome:
    """The connection between the launchers is dropped."""
    with behind_a_proxy(bench, "rendezvous_dropped") as (training, proxy):
        struck_at = strike(training, proxy.drop)
        return outcome(training, struck_at, "torchrun lost the other machines", bench.undisturbed())


ON_TWO_HOSTS = (
    worker_killed,
    worker_stopped,
    node_lost,
    node_lost_for_good,
    rendezvous_host_killed,
    link_down_shortly,
    link_down_for_a_while,
    link_down_for_good,
)
"""Those that need network namespaces."""
ON_ANY_MACHINE = (rendezvous_delayed, rendezvous_stalled, rendezvous_dropped)
