"""Faults of a run's files, of its MLflow server, and requests to stop; forms as in network_faults.py."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.measure import STEPS, STRIKE_AT, Bench, Outcome, outcome, strike
from cluster.training import Training
from commands import facetrain
from mlflow_server import free_port, mlflow_server
from proxy import TcpProxy
from small_disk import fill, small_disk


@contextmanager
def on_one_host(bench: Bench, name: str, **more: object) -> Iterator[Training]:
    """Start a training of two ranks on this machine, and let it come to the step of the fault."""
    with Training(bench.settings(name, **more), processes=2) as training:
        training.wait_for_step(STRIKE_AT)
        yield training


def job_killed_while_saving(bench: Bench) -> Outcome:
    """kill -9 of all processes in the middle of saving, three times; the same command is started again each time."""
    half_written = 0
    with Training(bench.settings("job_killed_while_saving"), processes=2) as training:
        checkpoints = training.run_dir / "checkpoints"
        for after_step in (STRIKE_AT - 20, STRIKE_AT - 10, STRIKE_AT):
            training.wait_for_step(after_step)
            while not list(checkpoints.glob(".step-*.tmp")):
                assert training.launcher().poll() is None, f"it ended before it was killed:\n{training.said()}"
                time.sleep(0.001)
            struck_at = strike(training, lambda: training.kill_node(0))
            half_written += bool(list(checkpoints.glob(".step-*.tmp")))
            training.start()
        note = f"{half_written} of 3 kills left a checkpoint half written"
        return outcome(training, struck_at, "continues at step", bench.undisturbed(), note=note)


def disk_full(bench: Bench) -> Outcome:
    """The disk is full for two checkpoints."""
    folder = bench.folder / "disk_full"
    folder.mkdir(parents=True)
    with small_disk(folder, size="160m"), on_one_host(bench, "disk_full/run") as training:
        struck_at = strike(training, lambda: fill(folder / "filler"))
        training.wait_for("failure 2 of 3 in a row")
        (folder / "filler").unlink()
        return outcome(training, struck_at, "no checkpoint could be written", bench.undisturbed())


def checkpoint_cut_off(bench: Bench) -> Outcome:
    """The newest checkpoint is cut off, and the job killed; the same command is started again."""
    return damaged(bench, "checkpoint_cut_off", lambda file: os.truncate(file, 1000))


def checkpoint_flipped(bench: Bench) -> Outcome:
    """One bit of the newest checkpoint changes, and the job is killed; the same command is started again."""
    return damaged(bench, "checkpoint_flipped", flip_a_bit)


def damaged(bench: Bench, name: str, harm: Callable[[Path], object]) -> Outcome:
    """Damage the newest checkpoint between two starts."""
    with on_one_host(bench, name) as training:
        struck_at = strike(training, lambda: training.kill_node(0))
        newest = max((training.run_dir / "checkpoints").glob("step-*"))
        harm(newest / "optimizer.safetensors")
        training.start()
        return outcome(training, struck_at, r"damaged \(optimizer", bench.undisturbed())


def flip_a_bit(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def asked_to_stop(bench: Bench) -> Outcome:
    """SIGTERM to the launcher; the same command is started again."""
    with on_one_host(bench, "asked_to_stop") as training:
        struck_at = strike(training, training.launcher().terminate)
        training.launcher().wait(60)
        training.start()
        return outcome(training, struck_at, "stopped at step", bench.undisturbed())


def asked_to_stop_one_rank(bench: Bench) -> Outcome:
    """SIGUSR1 to one rank; the same command is started again."""
    with on_one_host(bench, "asked_to_stop_one_rank") as training:
        struck_at = strike(training, lambda: training.worker().send_signal(signal.SIGUSR1))
        training.launcher().wait(60)
        training.start()
        return outcome(training, struck_at, "stopped at step", bench.undisturbed())


@contextmanager
def with_mlflow(bench: Bench, name: str, *, is_up: bool) -> Iterator[tuple[Training, TcpProxy, Path, ExitStack]]:
    """Start a training of two ranks that records at a port of a proxy, behind which a server is up from before or not.

    Yields the training, the proxy, the server's folder, and what ends the server when it is closed.
    """
    folder = bench.folder / f"{name}_server"
    folder.mkdir(parents=True)
    with TcpProxy(free_port()) as proxy, ExitStack() as server:
        if is_up:
            server.enter_context(mlflow_server(proxy.target_port, folder))
        env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{proxy.port}"}
        settings = bench.settings(name, tracking__backend="mlflow")
        with Training(settings, processes=2, env=env) as training:
            yield training, proxy, folder, server


def recorded(training: Training, proxy: TcpProxy) -> str:
    """Send what MLflow still lacks, and say whether it has each step once in one run."""
    uri = f"http://127.0.0.1:{proxy.target_port}"
    done = facetrain("sync", training.run_dir, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("facetrain").experiment_id])
    steps = sorted(metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss"))
    assert steps == list(range(1, STEPS + 1)), steps
    assert run.info.status == "FINISHED"
    return "one run in MLflow, each step once"


def mlflow_down_at_the_start(bench: Bench) -> Outcome:
    """MLflow's server isn't there until training is half way."""
    with with_mlflow(bench, "mlflow_down_at_the_start", is_up=False) as (training, proxy, folder, _):
        struck_at = time.monotonic()
        training.wait_for_step(STRIKE_AT)
        with mlflow_server(proxy.target_port, folder):
            training.wait_until_ended()
            note = recorded(training, proxy)
        return outcome(training, struck_at, "MLflow failed", bench.undisturbed(), note=note)


def mlflow_killed(bench: Bench) -> Outcome:
    """MLflow's server is killed half way, and is back after the end; then `facetrain sync`."""
    with with_mlflow(bench, "mlflow_killed", is_up=True) as (training, proxy, folder, server):
        training.wait_for_step(STRIKE_AT)
        struck_at = strike(training, server.close)
        training.wait_until_ended()
        with mlflow_server(proxy.target_port, folder):
            note = recorded(training, proxy)
        return outcome(training, struck_at, "MLflow failed", bench.undisturbed(), note=note)


def mlflow_hangs(bench: Bench) -> Outcome:
    """MLflow's server takes requests and never answers, from half way on; then `facetrain sync`."""
    with with_mlflow(bench, "mlflow_hangs", is_up=True) as (training, proxy, _, _):
        training.wait_for_step(STRIKE_AT)
        struck_at = strike(training, lambda: setattr(proxy, "mode", "stall"))
        training.wait_until_ended()
        note = recorded(training, proxy)
        return outcome(training, struck_at, "MLflow failed|MLflow lacks", bench.undisturbed(), note=note)


ON_A_SMALL_DISK = (disk_full,)
"""Those that need a file system to fill."""
ON_ANY_MACHINE = (
    job_killed_while_saving,
    checkpoint_cut_off,
    checkpoint_flipped,
    asked_to_stop,
    asked_to_stop_one_rank,
    mlflow_down_at_the_start,
    mlflow_killed,
    mlflow_hangs,
)
